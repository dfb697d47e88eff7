"""The chain of tasks behind a run or a file: carries rebuilt, references found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcp_plugin.delta import Delta, delta_to_tensors
from lcp_plugin.errors import DataError, LineageError
from lcp_plugin.evaluation.chains import read_chain, require_references
from lcp_plugin.formats.identity import hash_tensors
from lcp_plugin.store.run_folder import RunStore

pytestmark = pytest.mark.usefixtures("quick_encoder")


def hash_delta(delta: Delta) -> str:
    return hash_tensors(delta_to_tensors(delta, ""))


def test_earlier_carries_are_rebuilt_to_their_recorded_hash(run):
    store = RunStore(run.parent, run.name)
    assert not store.folders()[0].carry_file.exists()
    chain = read_chain(run)
    assert [t.name for t in chain.tasks] == ["disc0", "disc1"]
    first, second = (stage.load().delta for stage in chain.stages)
    assert hash_delta(chain.stages[0].load().delta) == hash_delta(
        first
    )  # stepping back starts anew
    assert hash_delta(first) != hash_delta(second)
    trained = Delta.of(store.folders()[0].read_adapter())
    assert hash_delta(first) == hash_delta(trained)
    assert hash_delta(second) == hash_delta(store.folders()[1].read_carry().total)


def test_a_changed_adapter_is_told(run):
    from lcp_plugin.formats.lora_file import read_lora, write_lora

    path = run / "01_disc0" / "adapter.safetensors"
    adapter = read_lora(path).adapter
    write_lora(path, adapter.map_down(lambda _, down: down * 2), {}, torch.float32)
    with pytest.raises(LineageError, match="01_disc0"):
        read_chain(run).stages[0].load()


def test_links_of_a_chain_are_one_chain(train, pictures):
    first = train("first", tasks=(0,), strategy="merge_init")
    second = train("second", tasks=(1,), strategy="merge_init", prev=str(first.store.root))
    chain = read_chain(second.store.root, pictures)
    assert [t.index for t in chain.tasks] == [1, 2]
    assert [s.name for s in chain.stages] == ["after 01_disc0", "after 02_disc1"]
    assert chain.cells() == [(0, 0), (0, 1), (1, 1)]
    require_references(chain)
    assert len(chain.tasks[0].references) == 3


def test_a_chain_on_anyones_lora_says_that_its_knowledge_is_not_scored(
    run, train, pictures, tmp_path, caplog
):
    foreign = tmp_path / "theirs.safetensors"
    save_file(load_file(run / "01_disc0" / "adapter.safetensors"), foreign)
    second = train("on_theirs", tasks=(1,), prev=str(foreign)).store.root
    assert [task.name for task in read_chain(second, pictures).tasks] == ["disc1"]
    assert "theirs.safetensors, a LoRA without task folders: what it knows is not" in caplog.text
    foreign.unlink()
    caplog.clear()
    read_chain(second, pictures)
    assert "which is no longer there" in caplog.text


def test_references_may_lie_one_folder_deeper(run, pictures, tmp_path):
    for name in ("disc0", "disc1"):
        shutil.copytree(pictures / name, tmp_path / "reference" / name / "an object")
    chain = read_chain(run, tmp_path / "reference")
    assert [len(task.references) for task in chain.tasks] == [3, 3]


def test_the_training_images_are_the_references_unless_others_are_given(run, pictures):
    trained_on = json.loads((run / "run.json").read_text("utf-8"))["images"]
    own, given = read_chain(run), read_chain(run, pictures)
    for chain, folders in (
        (own, [Path(trained_on[t.name][0]) for t in own.tasks]),
        (given, [pictures / t.name for t in given.tasks]),
    ):
        require_references(chain)
        assert [t.references for t in chain.tasks] == [
            tuple(sorted(folder.glob("*.png"))) for folder in folders
        ]
    assert own.tasks[0].references != given.tasks[0].references


def test_a_folder_without_tasks_and_tasks_without_references_are_told(run, tmp_path):
    with pytest.raises(DataError, match="no finished task"):
        read_chain(tmp_path / "nothing")
    with pytest.raises(DataError, match="disc0, disc1"):
        require_references(read_chain(run, tmp_path / "nothing"))
