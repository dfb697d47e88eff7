"""What merged files say alike of themselves is said of the merge too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from lora_samples import load_tool, mixed_adapter

from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_header

V, NOISE = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
BASE = {"ss_sd_model_name": "noob.safetensors", "ss_new_sd_model_hash": "ab" * 32}
OTHER = {"ss_sd_model_name": "sdxl.safetensors", "ss_new_sd_model_hash": "cd" * 32}


def merge(tmp_path: Path, *headers: Mapping[str, str]) -> dict[str, str]:
    """The header of what the command line makes of files with these."""
    paths = [tmp_path / f"{letter}.safetensors" for letter in "abc"[: len(headers)]]
    for path, header in zip(paths, headers, strict=True):
        write_lora(path, mixed_adapter(), header)
    target = tmp_path / "m.safetensors"
    arguments = [*map(str, paths), "-o", str(target), "--quiet"]
    assert load_tool("merge_adapters").main(arguments) == 0
    return dict(read_header(target).metadata)


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [((V, V), "v"), ((V, {}), "v"), ((NOISE, NOISE), "epsilon"), (({}, {}), "epsilon")],
)
def test_what_the_inputs_predict_is_what_the_merge_predicts(
    tmp_path: Path,
    headers: tuple[Mapping[str, str], ...],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert merge(tmp_path, *headers)["modelspec.prediction_type"] == wanted
    assert "predicts" not in capsys.readouterr().out


def test_inputs_that_predict_differently_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = merge(tmp_path, V, NOISE, {})
    assert "modelspec.prediction_type" not in header
    said = capsys.readouterr().out
    assert "a.safetensors is for a base that predicts v, b.safetensors for one" in said
    assert "c.safetensors" not in said


def test_a_base_that_all_inputs_name_travels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = merge(tmp_path, BASE, BASE)
    assert {key: header[key] for key in BASE} == BASE
    assert header["ss_lcp_base"] == "noob.safetensors"
    assert "different bases" not in capsys.readouterr().out


def test_bases_that_differ_are_said_and_none_travels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = merge(tmp_path, BASE, OTHER)
    assert not set(BASE) & set(header)
    assert "ss_lcp_base" not in header
    assert "different bases (noob.safetensors, sdxl.safetensors)" in capsys.readouterr().out


def test_a_base_that_one_input_does_not_name_does_not_travel(tmp_path: Path) -> None:
    header = merge(tmp_path, BASE, {})
    assert not set(BASE) & set(header)
    assert "ss_lcp_base" not in header
