"""peft folders of every kind, peft's own modules as the judge: merged by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import load_tool
from told import assert_one_error
from torch import Tensor, nn

from lcp_plugin.formats.lora_file import read_lora

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LINEAR = {f"{BLOCK}.{name}": (12, 8) for name in ("attn1.to_q", "attn2.to_k", "attn2.to_v")}
CONV = "down_blocks.1.resnets.0.conv1"
CASES: dict[str, dict[str, Any]] = {
    "the first pattern that matches holds": {
        "alpha_pattern": {r"attn2\.to_(k|v)": 32, "to_k": 1, "to_q": 2},
    },
    "patterns for ranks too": {"rank_pattern": {r".*attn2.*": 2}, "alpha_pattern": {"to_v": 3}},
    "a pattern from the start of the name": {"alpha_pattern": {"^down_blocks.1.*to_q": 5}},
    "a pattern is no part of a word": {"alpha_pattern": {"o_q": 5, "to_": 7}},
    "root of the rank": {"use_rslora": True},
    "a start that is no part of the base": {"init_lora_weights": "gaussian"},
}


def model_of(layers: dict[str, tuple[int, int]]) -> nn.Module:
    """A model that has these layers, named as in a UNet, and a convolution."""
    root = nn.Module()
    made: dict[str, nn.Module] = {n: nn.Linear(i, o, bias=False) for n, (o, i) in layers.items()}
    made[CONV] = nn.Conv2d(8, 12, 3, bias=False)
    for name, layer in made.items():
        place = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return root


def save(config: Any, folder: Path) -> dict[str, Tensor]:
    """Random weights under `config`, saved by peft; its own update of every layer."""
    from peft import get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model_of(LINEAR), config)
    layers = {n: m for n, m in wrapped.named_modules() if hasattr(m, "get_delta_weight")}
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(folder))
    prefix = "base_model.model."
    return {n[len(prefix) :]: m.get_delta_weight("default").detach() for n, m in layers.items()}


def merged(folder: Path, target: Path) -> dict[str, Tensor]:
    """What merge_adapters.py makes of a folder, by the name of its module in the UNet."""
    assert load_tool("merge_adapters").main([str(folder), "-o", str(target)]) == 0
    return {n.removeprefix("unet."): e.dense() for n, e in read_lora(target).total.items()}


def check(config: Any, tmp_path: Path) -> None:
    wanted = save(config, tmp_path / "unet")
    got = merged(tmp_path / "unet", tmp_path / "m.safetensors")
    assert got.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(got[name], update.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_lora_folder_has_the_strength_that_peft_gives_it(tmp_path: Path, case: str) -> None:
    from peft import LoraConfig

    targets = [*LINEAR, CONV]
    check(LoraConfig(r=4, lora_alpha=16, target_modules=targets, **CASES[case]), tmp_path)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_loha_and_lokr_folders_have_the_strength_that_peft_gives_them(
    tmp_path: Path, kind: str, effective: bool
) -> None:
    import peft

    config = getattr(peft, f"{kind}Config")(
        r=2,
        alpha=6,
        target_modules=[*LINEAR, CONV],
        use_effective_conv2d=effective,
        alpha_pattern={r"attn2\.to_(k|v)": 16},
        rank_pattern={"to_v": 1},
    )
    check(config, tmp_path)


def test_a_lokr_of_two_whole_matrices_has_pefts_scale_too(tmp_path: Path) -> None:
    from peft import LoKrConfig

    rank = 64  # larger than the matrices: peft leaves both whole, and still multiplies by alpha / r
    check(LoKrConfig(r=rank, alpha=16, target_modules=[*LINEAR, CONV]), tmp_path)


def refuse(
    folder: Path, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA folder whose configuration is changed is refused in one line that says `words`."""
    from peft import LoraConfig

    save(LoraConfig(r=4, target_modules=list(LINEAR)), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    target = folder.parent / "m.safetensors"
    assert load_tool("merge_adapters").main([str(folder), "-o", str(target)]) != 0
    error = capsys.readouterr().err
    assert words in error
    assert_one_error(error)
    assert not target.exists()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq"])
def test_factors_that_were_taken_out_of_the_base_are_no_update(
    tmp_path: Path, init: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "path_initial_model_for_weight_conversion"
    refuse(tmp_path / "unet", {"init_lora_weights": init}, words, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "IA3; LoRA, LoHa and LoKr are read"),
        ({"peft_type": "OFT"}, "OFT; LoRA, LoHa and LoKr are read"),
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alpha_pattern": {"(": 4}}, "configuration"),
        ({"alpha_pattern": {"to_q": "many"}}, "configuration"),
        ({"lora_alpha": "many"}, "configuration"),
    ],
)
def test_other_kinds_and_damaged_configurations_are_one_line(
    tmp_path: Path, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(tmp_path / "unet", changes, words, capsys)
