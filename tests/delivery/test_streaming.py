"""MagMax from file to file: the same bytes as on whole deltas, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delivery.streaming import BLOCK, select_files
from lcp_plugin.delta import Delta, Dense, Stacked, delta_to_tensors
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import write_tensors
from lcp_plugin.hooks import Carry
from lcp_plugin.store.carries import carry_to_tensors

BLOCK_NAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1."
Q, K, V, OUT = (BLOCK_NAME + part for part in ("to_q", "to_k", "to_v", "to_out.0"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(out: int, inputs: int, rank: int, seed: int, alpha: float = 3.0) -> Factors:
    return Factors(draw(rank, inputs, seed=seed), draw(out, rank, seed=seed + 1), alpha)


def stacked(out: int, inputs: int, blocks: tuple[int, ...], seed: int) -> Stacked:
    rank = sum(blocks)
    return Stacked(draw(out, rank, seed=seed), draw(rank, inputs, seed=seed + 1), blocks)


def carry() -> Carry:
    """Every form there is: stacked, dense, a convolution, an adapter alone and on top of both."""
    delta = Delta(
        {
            Q: stacked(130, 64, (4, 4), 10),
            K: Dense(draw(130, 64, seed=12)),
            CONV: Dense(draw(16, 36, seed=13), kernel=(3, 3)),
            TEXT: stacked(20, 20, (2, 2), 14),
        }
    )
    adapter = Adapter({Q: factors(130, 64, 4, 20), K: factors(130, 64, 4, 22)})
    return Carry(delta, adapter)


def update() -> Adapter:
    conv = Factors(draw(2, 36, seed=30), draw(16, 2, seed=31), 2.0, (3, 3))
    whole = {name: factors(130, 64, 4, seed) for name, seed in ((Q, 40), (K, 42), (V, 44))}
    return Adapter({**whole, CONV: conv})


def written(path: Path, delta: Delta) -> bytes:
    write_tensors(path, delta_to_tensors(delta, "delta/"), {"a": "b"})
    return path.read_bytes()


def test_an_adapter_against_a_carry_gives_the_bytes_of_the_whole_delta(tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter.safetensors", update())
    write_tensors(tmp_path / "carry.safetensors", carry_to_tensors(carry()))
    found = select_files(
        tmp_path / "adapter.safetensors",
        tmp_path / "carry.safetensors",
        tmp_path / "after.safetensors",
        {"a": "b"},
    )
    newest = read_lora(tmp_path / "adapter.safetensors").total
    wanted = written(tmp_path / "wanted.safetensors", newest.select_by_magnitude(carry().total))
    assert (tmp_path / "after.safetensors").read_bytes() == wanted
    assert (found.modules, found.selected, found.bytes) == (5, 3, len(wanted))


def test_two_carries_give_the_bytes_of_the_whole_delta(tmp_path: Path) -> None:
    shape = (300, 700)
    assert shape[0] * shape[1] > BLOCK  # more than one block, and a last one that is shorter
    one, two = (Carry(Delta({OUT: Dense(draw(*shape, seed=s))})) for s in (1, 2))
    for name, value in (("one", one), ("two", two)):
        write_tensors(tmp_path / f"{name}.safetensors", carry_to_tensors(value))
    target = tmp_path / "after.safetensors"
    select_files(tmp_path / "one.safetensors", tmp_path / "two.safetensors", target, {"a": "b"})
    selected = one.total.select_by_magnitude(two.total)
    assert target.read_bytes() == written(tmp_path / "wanted.safetensors", selected)


def test_ties_go_to_the_newest(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {f"delta/{Q}.dense": torch.full((2, 2), -1.0)})
    write_tensors(tmp_path / "b.safetensors", {f"delta/{Q}.dense": torch.full((2, 2), 1.0)})
    select_files(*(tmp_path / f"{n}.safetensors" for n in "abc"))
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_other_shapes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {f"delta/{Q}.dense": torch.ones(2, 2)})
    write_tensors(tmp_path / "b.safetensors", {f"delta/{Q}.dense": torch.ones(2, 3)})
    with pytest.raises(FileFormatError, match="different bases"):
        select_files(*(tmp_path / f"{n}.safetensors" for n in "abc"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, bad: float) -> None:
    write_tensors(tmp_path / "a.safetensors", {f"delta/{Q}.dense": torch.ones(2, 2)})
    write_tensors(tmp_path / "b.safetensors", {f"delta/{Q}.dense": torch.tensor([[1.0, bad]] * 2)})
    with pytest.raises(NumericError, match="NaN or infinity"):
        select_files(*(tmp_path / f"{n}.safetensors" for n in "abc"))
    assert not (tmp_path / "c.safetensors").exists()
