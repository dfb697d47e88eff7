"""A deliverable that another tool changed is gone on from as anyone's LoRA, and said to be so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcp_plugin.cli import main
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.tensors import read_header, read_tensors

SAID = "another tool changed its tensors"


def change(path: Path, target: Path, renew: bool) -> Path:
    """A file that a merge or resize script left: other tensors under a copy of the header.

    `renew`: kohya's two hashes are computed anew.
    """
    from safetensors.torch import save_file

    metadata = dict(read_header(path).metadata)
    tensors = {k: t.clone() for k, t in read_tensors(path).items()}
    halved = {k: t * 0.5 if "lora_up" in k else t for k, t in tensors.items()}
    save_file(halved, target, metadata)
    if renew:
        save_file(halved, target, {**metadata, "sshs_model_hash": file_model_hash(target)})
    return target


@pytest.mark.parametrize("renew", [False, True])
def test_a_changed_deliverable_goes_on_as_a_foreign_file(
    tmp_path: Path,
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    renew: bool,
) -> None:
    first = write_config("first", (0, 1), strategy="merge_init")
    assert main(["--config", str(first)]) == 0
    deliverable = tmp_path / "out" / "first.safetensors"
    changed = change(deliverable, tmp_path / "resized.safetensors", renew)

    def follow(name: str, prev: Path) -> tuple[dict[str, object], str]:
        capsys.readouterr()
        config = write_config(name, (2,), strategy="naive")
        code = main(["--config", str(config), "--prev", str(prev)])
        captured = capsys.readouterr()
        folder = tmp_path / "out" / name / "parent" / "lineage.json"
        return (read_json(folder) if code == 0 else {}), captured.out + captured.err

    kept, words = follow("refused", deliverable)
    assert not kept
    assert "merge_init" in words  # a file as written knows its strategy
    assert SAID not in words
    parent, words = follow("second", changed)
    assert words.count(SAID) == 1
    assert "resized.safetensors" in words
    assert parent["foreign"] is True
    assert parent["strategy"]["name"] is None  # type: ignore[index]
    header = read_header(tmp_path / "out" / "second.safetensors").metadata
    tasks = [task["name"] for task in json.loads(header["ss_lcp_tasks"])]
    assert tasks == ["disc0", "disc1", "disc2"]


def test_a_changed_files_ranks_are_one_block(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    assert main(["--config", str(write_config("first", (0, 1), strategy="merge_init"))]) == 0
    deliverable = tmp_path / "out" / "first.safetensors"
    changed = change(deliverable, tmp_path / "mixed.safetensors", renew=True)
    more = write_config("more", (2,), strategy="merge_init")
    assert main(["--config", str(more), "--prev", str(changed)]) == 0
    same = write_config("same", (2,), strategy="merge_init")
    assert main(["--config", str(same), "--prev", str(deliverable)]) == 0
    blocks = {}
    for name in ("more", "same"):
        header = read_header(tmp_path / "out" / f"{name}.safetensors").metadata
        blocks[name] = set(map(tuple, json.loads(header["ss_lcp_blocks"]).values()))
    assert blocks["same"] == {(2, 2, 2)}
    assert (2, 2, 2) not in blocks["more"]
    before, after = (read_lora(p).total for p in (deliverable, changed))
    module = next(iter(before))
    torch.testing.assert_close(after[module].dense(), before[module].dense() / 2)
