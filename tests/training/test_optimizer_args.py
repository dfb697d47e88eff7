"""optimizer_args that an optimizer refuses are one line before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from told import assert_one_error

from lcp_plugin.cli import main
from lcp_plugin.training import optimizers as optim

Told = Callable[..., str]
REFUSED = [  # optimizer_type, optimizer_args, what is said
    ("", "decouple=True", "there is no argument 'decouple'; it takes betas, eps, weight_decay"),
    ("AdamW", "weight_decai=0.1", "did you mean 'weight_decay'?"),
    ("AdamW", "weight_decay=0.1 betas=0.9,0.99", "an argument of its own, unquoted"),
    ("AdamW", "weight_decay=high", "weight_decay=high should be a number such as 0.01"),
    ("AdamW", "amsgrad=false", "amsgrad=false should be True or False"),
    ("AdamW", "betas=0.9", "betas=0.9 should be 2 values as in 0.9,0.999"),
    ("AdamW", "betas=2.0,0.9", "Invalid beta parameter"),
    ("AdamW", "lr=1e-3", "set learning_rate instead"),
    ("torch.optim.RMSprop", "betas=0.9,0.99", "there is no argument 'betas'"),
    ("SGDNesterov", "momentum=0.0", "Nesterov momentum requires"),
    ("Adafactor", "relative_step=False warmup_init=True", "an argument of its own"),
    ("Adafactor", "eps=1e-8", "eps=1e-08 should be 2 values"),
    ("Adafactor", "clip_threshold=high", "should be a number such as 1.0"),
    ("AdamW8bit", "decouple=True", "there is no argument 'decouple'; it takes betas"),
    ("Lion8bit", "betas=2.0,0.9", "Invalid beta parameter"),
]
PACKAGES = [
    ("Prodigy", "prodigyopt", "safeguard_warmup=yes", "should be True or False"),
    ("Prodigy", "prodigyopt", "decuple=True", "did you mean 'decouple'?"),
    ("DAdaptAdam", "dadaptation", "d0=small", "d0=small should be a number"),
    ("AdamWScheduleFree", "schedulefree", "warmup=10", "did you mean 'warmup_steps'?"),
]


@pytest.fixture
def refused(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Told:
    """refused(type, *args): what a run and its dry run say of them; no model is loaded for it."""

    def tell(name: str, *args: str) -> str:
        monkeypatch.setattr("lcp_plugin.run.runner.load_base", None)
        config = write_config("run", tasks=(0,), optimizer_type=name, learning_rate=1.0)
        told = []
        for flags in ([], ["--dry_run"]):
            capsys.readouterr()
            assert main(["--config", str(config), "--optimizer_args", *args, *flags]) == 2
            error = capsys.readouterr().err
            assert_one_error(error)
            told.append(error.splitlines()[0])
        assert not list((tmp_path / "out").rglob("*"))
        assert told[0] == told[1]
        assert told[0].startswith("error: optimizer_args do not fit ")
        return told[0]

    return tell


@pytest.mark.parametrize(("name", "arg", "told"), REFUSED)
def test_what_an_optimizer_refuses_is_known_early(
    refused: Told, name: str, arg: str, told: str
) -> None:
    line = refused(name, arg)
    assert told in line
    assert f"(optimizer_type = '{name or 'AdamW'}')" in line


@pytest.mark.parametrize(("name", "package", "arg", "told"), PACKAGES)
def test_optimizers_of_packages_too(
    refused: Told, name: str, package: str, arg: str, told: str
) -> None:
    pytest.importorskip(package)
    assert told in refused(name, arg)


def test_without_bitsandbytes_the_optimizer_in_its_place_is_asked(
    refused: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(label: str) -> None:
        raise ImportError("no CUDA")

    monkeypatch.setattr(optim, "_bitsandbytes_class", fail)
    line = refused("AdamW8bit", "percentile_clipping=5")
    assert "torch.optim.AdamW (optimizer_type = 'AdamW8bit'): there is no argument" in line


def test_the_arguments_of_one_task_are_looked_at(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0, 1))
    text = config.read_text(encoding="utf-8")
    config.write_text(text + '\noptimizer_args = ["decouple=True"]\n', encoding="utf-8")
    assert main(["--config", str(config), "--dry_run"]) == 2
    assert "there is no argument 'decouple'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("AdamW", ("weight_decay=0.1", "betas=0.9,0.99")),
        ("AdamW8bit", ("weight_decay=1", "eps=1e-6")),
        ("Adafactor", ("relative_step=False", "scale_parameter=False", "warmup_init=False")),
        ("SGD", ("momentum=0",)),
        ("LION", ("betas=[0.9, 0.98]",)),
    ],
)
def test_arguments_that_fit_pass(
    write_config: Callable[..., Path], name: str, args: tuple[str, ...]
) -> None:
    config = write_config("run", tasks=(0,), optimizer_type=name)
    assert main(["--config", str(config), "--dry_run", "--optimizer_args", *args]) == 0
