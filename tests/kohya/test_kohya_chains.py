"""Chains that pass from one trainer to the other: bases, strategies and names by one rule."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from kohya_trainer import BOOTS, Trainer, make
from lora_samples import mixed_adapter

from lcp_plugin.errors import LineageError
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.load import identify_base


@pytest.mark.parametrize("said", ["IsADirectory", "", "NOFILE"])
def test_our_own_identity_of_the_base_is_recorded(
    tmp_path: Path, toy: object, toy_base: Path, said: str
) -> None:
    trainer = Trainer(copy.deepcopy(toy), {"task": "can"})
    trainer.network.prepare_network(SimpleNamespace(pretrained_model_name_or_path=str(toy_base)))
    file = tmp_path / "one.safetensors"
    trainer.network.save_weights(str(file), None, {"ss_new_sd_model_hash": said})
    lineage = Lineage.from_metadata(read_header(file).metadata)
    assert lineage is not None
    assert lineage.base_hash == identify_base(str(toy_base)).hash
    trainer.network._base = None  # a base that cannot be told
    trainer.network.save_weights(str(file), None, {"ss_new_sd_model_hash": said})
    assert "ss_lcp_base_hash" not in read_header(file).metadata


@pytest.mark.parametrize("strategy", ["merge_init", "merge:sum"])
def test_a_start_of_its_own_an_unknown_base_and_a_merge_are_gone_on_from(
    tmp_path: Path, toy: object, toy_base: Path, strategy: str
) -> None:
    lineage = Lineage((BOOTS,), strategy, ("init=kaiming",), "x", "IsADirectory", "delta")
    file = tmp_path / "parent.safetensors"
    write_lora(file, mixed_adapter(), lineage.to_metadata())
    network = make(toy, prev=str(file), strategy="merge_init")
    network.prepare_network(SimpleNamespace(pretrained_model_name_or_path=str(toy_base)))
    with pytest.raises(LineageError, match="already in the chain"):
        make(toy, prev=str(file), strategy="merge_init", task="boots")
