"""Checkpoints of torch: tensors come out, code does not run, damage is one line."""

import pytest
import torch

from lcp_plugin.errors import FileFormatError
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.networks import strip_prefixes


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_is_read_with_the_arguments_of_its_trainer_left_out(tmp_path, zipped):
    import argparse

    storage = torch.arange(12.0)
    state = {
        "module.w": storage.view(3, 4).t(),  # not contiguous, shares a storage
        "module.b": storage[2:5],
        "half": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "count": torch.tensor(7),
    }
    file = tmp_path / "checkpoint.pth"
    everything = {"model_state_dict": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    torch.save(everything, file, _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(file)
    assert sorted(tensors) == sorted(f"model_state_dict.{k}" for k in state)
    for key, tensor in state.items():
        assert torch.equal(tensors[f"model_state_dict.{key}"], tensor.detach())
    assert sorted(strip_prefixes(tensors)) == ["b", "count", "half", "w"]


class _Foreign:
    """A class of somebody else's, beside the tensors."""


def test_a_checkpoint_that_would_run_code_runs_none(tmp_path):
    target = tmp_path / "made_by_the_file"
    code = f"cposix\nsystem\n(Vtouch {target}\ntR."
    (tmp_path / "evil.pth").write_bytes(code.encode())
    with pytest.raises(FileFormatError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_a_foreign_object_is_refused_by_its_name(tmp_path, zipped):
    file = tmp_path / "foreign.pth"
    state = {"w": torch.ones(2), "best": _Foreign()}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"foreign\.pth is not a .*_Foreign in it") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)


def _cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _scramble(whole: bytes) -> bytes:
    return whole[:200] + bytes(reversed(whole[200:400])) + whole[400:]


@pytest.mark.parametrize("damage", [lambda _: b"\x80\x02nonsense", _cut, _scramble])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, damage, zipped):
    file = tmp_path / "cut.pth"
    torch.save({"w": torch.ones(64)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FileFormatError, match=r"cut\.pth is a truncated or damaged") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)
