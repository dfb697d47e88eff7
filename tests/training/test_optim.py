"""Optimizers by name, what takes the place of a broken bitsandbytes, and state without pickle."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lcp_plugin.errors import ConfigError, ResumeError
from lcp_plugin.training import optimizers as optim
from lcp_plugin.training.optimizer_args import parse_arguments
from lcp_plugin.training.optimizer_state import flatten_state, unflatten_state
from lcp_plugin.training.optimizers import OptimizerChoice, create_optimizer


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """One big enough to be quantised (4096 entries and more), one small."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((64, 128), (3, 5))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make(name: str, *args: str, rate: float = 1e-2, seed: int = 0) -> tuple[Any, str, list[Any]]:
    values = parameters(seed)
    optimizer, used = create_optimizer(
        OptimizerChoice(name, args, rate), [{"params": values, "lr": rate}]
    )
    return optimizer, used, values


def step(optimizer: Any, values: list[nn.Parameter], index: int) -> None:
    generator = torch.Generator().manual_seed(100 + index)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes whose kernels do not run."""

    def fail(label: str) -> Any:
        raise RuntimeError("CUDA Setup failed despite GPU being available\nmany more lines")

    monkeypatch.setattr(optim, "_bitsandbytes_class", fail)


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("", "torch.optim.AdamW"),
        ("AdamW", "torch.optim.AdamW"),
        ("adamw", "torch.optim.AdamW"),
        ("Adam", "torch.optim.Adam"),
        ("SGD", "torch.optim.SGD"),
        ("SGDNesterov", "torch.optim.SGD"),
        ("RMSprop", "torch.optim.RMSprop"),
        ("torch.optim.NAdam", "torch.optim.NAdam"),
        ("AdaFactor", "transformers.optimization.Adafactor"),
        ("transformers.optimization.Adafactor", "transformers.optimization.Adafactor"),
        ("AdamW8bit", "bitsandbytes.optim.AdamW8bit"),
        ("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"),
        ("Lion8bit", "bitsandbytes.optim.Lion8bit"),
        ("Lion", "bitsandbytes.optim.Lion"),
    ],
)
def test_kohyas_names_torchs_names_and_dotted_paths(name: str, used: str) -> None:
    optimizer, recorded, values = make(name)
    assert recorded.partition("(")[0] == used
    kind = type(optimizer)
    assert kind.__qualname__ == used.rpartition(".")[2]
    before = [v.detach().clone() for v in values]
    step(optimizer, values, 0)
    assert not any(torch.equal(a, b) for a, b in zip(before, values, strict=True))


def test_nesterov_sgd_has_kohyas_momentum() -> None:
    optimizer, used, _ = make("SGDNesterov")
    assert optimizer.defaults["nesterov"] is True
    assert optimizer.defaults["momentum"] == 0.9
    assert "momentum=0.9" in used


def test_arguments_are_python_literals() -> None:
    texts = ["betas=(.9, .999)", "weight_decay=1e-4", "amsgrad=False", "mode=fast", "eps = 1e-6"]
    assert parse_arguments(texts) == {
        "betas": (0.9, 0.999),
        "weight_decay": 1e-4,
        "amsgrad": False,
        "mode": "fast",
        "eps": 1e-6,
    }
    optimizer, used, _ = make("AdamW", "weight_decay=1e-4", "betas=(.8,.99)")
    assert optimizer.defaults["weight_decay"] == 1e-4
    assert optimizer.defaults["betas"] == (0.8, 0.99)
    assert "weight_decay=0.0001" in used


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("AdmW", (), "optimizer_type = 'AdmW' is not known; did you mean 'Adam"),
        ("Lion8bits", (), "did you mean 'Lion8bit'"),
        ("zzzzzz", (), "give a torch.optim name or pkg.Class"),
        ("torch.optim.Nothing", (), "torch.optim has no 'Nothing'"),
        ("no_such_package.Optimizer", (), "needs the package no_such_package"),
        ("AdamW", ("weight_decai=1",), "optimizer_args do not fit torch.optim.AdamW"),
        ("AdamW8bit", ("weight_decai=1",), "optimizer_args do not fit"),
        ("AdamW", ("lr",), "should read key=value"),
        ("AdamW", ("betas=(2, .9)",), "optimizer_args do not fit"),
    ],
)
def test_mistakes_are_one_line(name: str, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(name, *args)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ bitsandbytes


def test_the_8_bit_optimizer_really_keeps_8_bits_of_big_tensors() -> None:
    optimizer, _, values = make("AdamW8bit")
    step(optimizer, values, 0)
    assert optimizer.state[values[0]]["state1"].dtype is torch.uint8
    assert optimizer.state[values[1]]["state1"].dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("AdamW8bit", "torch.optim.AdamW"),
        ("PagedAdamW8bit", "torch.optim.AdamW"),
        ("PagedAdamW", "torch.optim.AdamW"),
        ("SGDNesterov8bit", "torch.optim.SGD"),
    ],
)
@pytest.mark.usefixtures("broken")
def test_a_broken_bitsandbytes_gives_one_warning_and_the_same_algorithm(
    name: str, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        optimizer, used, values = make(name, "weight_decay=0.01")
    assert used.partition("(")[0] == instead
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1
    assert "CUDA Setup failed" in warnings[0]
    assert f"{instead} instead of" in warnings[0]
    assert "\n" not in warnings[0]
    assert optimizer.defaults["weight_decay"] == 0.01
    step(optimizer, values, 0)


@pytest.mark.parametrize("name", ["Lion8bit", "Lion", "AdEMAMix8bit", "PagedLion8bit"])
@pytest.mark.usefixtures("broken")
def test_an_algorithm_that_torch_lacks_is_an_error_without_bitsandbytes(name: str) -> None:
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is unusable here") as caught:
        make(name)
    assert "use AdamW or Adafactor" in str(caught.value)


def test_a_bitsandbytes_whose_kernels_raise_is_found_out_before_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stub(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(optim, "_bitsandbytes_class", lambda label: Stub)
    optimizer, used, _ = make("AdamW8bit")
    assert type(optimizer) is torch.optim.AdamW
    assert used.startswith("torch.optim.AdamW")
    assert "libcudart" in caplog.text


def test_a_missing_bitsandbytes_is_treated_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    optimizer, _, _ = make("AdamW8bit")
    assert type(optimizer) is torch.optim.AdamW
    assert len(caplog.records) == 1


def test_trying_the_kernels_does_not_move_the_parameters() -> None:
    _, _, values = make("AdamW8bit")
    assert all(torch.equal(a, b) for a, b in zip(values, parameters(), strict=True))


# -------------------------------------------------------------------------------------------- state


def through_files(state: dict[str, Any], folder: Path) -> Any:
    """A state_dict through safetensors and JSON, as the trainer saves it."""
    tensors, rest = flatten_state(state)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(rest), encoding="utf-8")
    read = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return unflatten_state(load_file(folder / "optimizer.safetensors"), read)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("AdamW", ()),
        ("AdamW", ("amsgrad=True", "weight_decay=0.1")),
        ("AdamW8bit", ()),
        ("PagedAdamW8bit", ()),
        ("Lion8bit", ()),
        ("AdaFactor", ()),
        ("AdaFactor", ("relative_step=False", "scale_parameter=False")),
        ("SGDNesterov", ()),
    ],
)
def test_a_restored_optimizer_takes_the_very_same_steps(
    name: str, args: tuple[str, ...], tmp_path: Path
) -> None:
    optimizer, _, values = make(name, *args)
    for index in range(3):
        step(optimizer, values, index)
    state = through_files(optimizer.state_dict(), tmp_path)
    resumed, _, others = make(name, *args, seed=1)
    with torch.no_grad():
        for other, value in zip(others, values, strict=True):
            other.copy_(value)
    resumed.load_state_dict(state)
    for index in range(3, 6):
        step(optimizer, values, index)
        step(resumed, others, index)
        assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True)), index


def test_a_state_keeps_its_types(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "q": torch.arange(4, dtype=torch.uint8)}, 1: {}},
        "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "params": [0, 1], "fused": None}],
        "dtype": torch.bfloat16,
        "flag": True,
        "odd": 0.1 + 0.2,
    }
    back = through_files(state, tmp_path)
    assert isinstance(back["param_groups"][0]["betas"], tuple)
    assert back["param_groups"] == state["param_groups"]
    assert list(back["state"]) == [0, 1]
    assert back["state"][0]["q"].dtype is torch.uint8
    assert (back["dtype"], back["flag"], back["odd"]) == (torch.bfloat16, True, 0.1 + 0.2)


def test_flattening_copies_the_tensors() -> None:
    value = torch.zeros(3)
    tensors, _ = flatten_state({"a": value})
    value += 1
    assert not tensors["state/a"].any()


def test_what_only_pickle_could_save_is_an_error() -> None:
    class Thing:
        pass

    with pytest.raises(ResumeError, match="keeps a Thing in its state"):
        flatten_state({"state": {0: {"x": Thing()}}})


def test_an_optimizer_of_two_groups_keeps_their_rates() -> None:
    first, second = parameters()
    groups = [{"params": [first], "lr": 1e-3}, {"params": [second], "lr": 1e-2}]
    optimizer, _ = create_optimizer(OptimizerChoice("AdamW", rate=1e-3), groups)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-2]
    assert isinstance(first, Tensor)


def test_infinite_numbers_of_a_state_survive_json() -> None:
    state = {"param_groups": [{"growth_rate": float("inf"), "d": -float("inf"), "lr": 1.0}]}
    tensors, rest = flatten_state(state)
    text = json.dumps(rest, allow_nan=False)
    assert unflatten_state(tensors, json.loads(text)) == state
