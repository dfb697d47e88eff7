"""A parent that changes biases (LyCORIS' diff_b): its change stays under every task to come."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import run_and_kill
from lora_samples import random_adapter, random_biases, with_biases
from toy_live import predict
from toy_runs import assert_equal_tensors, read_all

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import Biases
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.hooks import Carry
from lcp_plugin.store.run_folder import RunStore

Train = Callable[..., Any]
CONV = "unet.down_blocks.0.resnets.0.conv1"


@pytest.fixture
def theirs(tmp_path: Path, make_base: Callable[..., Any]) -> tuple[Path, Biases]:
    """A LoCon file on UNet and text encoders, that changes biases too."""
    pipeline = make_base().pipeline
    adapter = random_adapter(
        pipeline, lambda n: n.endswith(("to_q", "fc1", "conv1")), lambda i: (2, 2.0), size=0.1
    )
    biases = random_biases(pipeline, lambda n: n.endswith(("conv1", "to_out.0", "fc1", "fc2")))
    assert CONV in biases
    path = tmp_path / "theirs.safetensors"
    write_lora(path, adapter, {"ss_network_module": "lycoris.kohya"}, biases=biases)
    return path, biases


def biases_of(run: Any) -> tuple[Biases, Biases]:
    """Those of a run's last carry, and of its deliverable."""
    return run.store.folders()[-1].read_carry().biases, read_lora(run.store.deliverable).biases


def assert_same(got: Biases, wanted: Biases) -> None:
    assert_equal_tensors(dict(got), dict(wanted))


@pytest.mark.parametrize("strategy", ["naive", "merge_ortho_init"])
def test_biases_cross_every_boundary_and_are_delivered(
    train: Train,
    theirs: tuple[Path, Biases],
    make_base: Callable[..., Any],
    strategy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, biases = theirs
    whole = train("whole", prev=str(path), strategy=strategy)
    assert "diffusers refuses the file" in caplog.text
    rebuilt = whole.store.carry_after(whole.store.folders()[0].index)
    for found in (*biases_of(whole), rebuilt.biases):
        assert_same(found, biases)
    first = train("first", tasks=(0,), prev=str(path), strategy=strategy)
    second = train("second", tasks=(1,), prev=str(first.store.root), strategy=strategy)
    assert_equal_tensors(read_all(whole.store), read_all(second.store))
    by_file = train("file", tasks=(1,), prev=str(first.store.deliverable), strategy=strategy)
    assert_same(biases_of(by_file)[1], biases)
    carry: Carry = whole.store.folders()[-1].read_carry()
    base = make_base()
    base.adapted.set_base(carry.total)
    without = predict(base)
    base.pipeline.unet = base.adapted.unet
    changed = with_biases(base.pipeline, biases).unet  # type: ignore[attr-defined]
    base.adapted.unet.load_state_dict(changed.state_dict())
    wanted = predict(base)
    whole.base.show(carry.change)
    assert float((wanted - without).abs().max()) > 1e-2
    torch.testing.assert_close(predict(whole.base), wanted, rtol=1e-4, atol=1e-5)


def test_a_killed_run_on_changed_biases_goes_on_to_the_same_tensors(
    write_config: Callable[..., Path], tmp_path: Path, theirs: tuple[Path, Biases]
) -> None:
    config = write_config("run", prev=str(theirs[0]))
    status, events = run_and_kill(config, None)
    assert status == 0
    wanted = read_all(RunStore(tmp_path / "out", "run"))
    shutil.move(tmp_path / "out", tmp_path / "whole")
    status, _ = run_and_kill(config, events // 2)
    assert status == -signal.SIGKILL
    status, _ = run_and_kill(config, None)
    assert status == 0
    assert_equal_tensors(wanted, read_all(RunStore(tmp_path / "out", "run")))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_base_weights_change_biases_with_their_multiplier(
    make_base: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    plain = make_base(mixed_precision=precision)
    biases = random_biases(plain.pipeline, lambda n: n.endswith("conv1"))
    write_lora(tmp_path / "b.safetensors", Adapter(), biases=biases)
    given = {
        "base_weights": (str(tmp_path / "b.safetensors"),),
        "base_weights_multiplier": (0.5,),
    }
    moved = predict(make_base(mixed_precision=precision, **given))
    before = predict(plain)
    changed = with_biases(plain.pipeline, biases.weighted(0.5)).unet  # type: ignore[attr-defined]
    plain.adapted.unet.load_state_dict(changed.state_dict())
    expected = predict(plain)
    assert float((expected - before).abs().max()) > 1e-2
    assert float((moved - expected).abs().max()) < (1e-4 if precision == "no" else 3e-2)


def test_network_weights_bring_their_biases_along(
    train: Train, theirs: tuple[Path, Biases]
) -> None:
    run = train("run", tasks=(0,), network_weights=str(theirs[0]))
    for found in biases_of(run):
        assert_same(found, theirs[1])


@pytest.mark.parametrize(
    ("name", "length", "words"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 32, "has none there"),
        (CONV, 5, "changes the bias of .* in 5 places; base .* has 16"),
    ],
)
def test_a_bias_that_the_base_has_not_is_one_line(
    train: Train, tmp_path: Path, name: str, length: int, words: str
) -> None:
    write_lora(tmp_path / "b.safetensors", Adapter(), biases=Biases({name: torch.ones(length)}))
    with pytest.raises(LineageError, match=words):
        train("run", tasks=(0,), prev=str(tmp_path / "b.safetensors"))
