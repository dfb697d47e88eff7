"""Files of well-known tools at the tools' command lines: read, or refused in one line that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_samples import load_tool
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from told import assert_one_error
from torch import Tensor

from lcp_plugin.formats.lora_file import read_lora

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
FLAT = "lora_unet_" + f"{BLOCK}.attn1.to_q".replace(".", "_")
CHAIN = {
    "ss_lcp_format": "1",
    "ss_lcp_strategy": "merge_init",
    "ss_lcp_tasks": json.dumps(
        [
            {"index": i, "name": name, "kind": "object", "concept": name}
            for i, name in enumerate(("teapot", "can"), 1)
        ]
    ),
    "ss_lcp_blocks": json.dumps({"*": [2, 2]}),
}


def lora(name: str, out: int = 12, inputs: int = 8, rank: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(len(name))
    return {
        f"{name}.lora_down.weight": torch.randn(rank, inputs),
        f"{name}.lora_up.weight": torch.randn(out, rank),
        f"{name}.alpha": torch.tensor(2.0),
    }


def update(tensors: dict[str, Tensor], name: str) -> Tensor:
    """alpha / rank * B A as the formula has it."""
    return tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * (2 / 4)


@pytest.mark.parametrize(
    "names",
    [
        (f"unet.input_blocks.4.1.{BLOCK[-20:]}.attn1.to_q", f"clip_l.{TEXT}", f"clip_g.{TEXT}"),
        (
            f"diffusion_model.input_blocks.4.1.{BLOCK[-20:]}.attn1.to_q",
            f"text_encoders.clip_l.transformer.{TEXT}",
            f"text_encoders.clip_g.transformer.{TEXT}",
        ),
        (f"lycoris_{BLOCK}.attn1.to_q".replace(".", "_"), *(f"lora_te{i}_" for i in "")),
    ],
    ids=["OneTrainer", "ComfyUI", "SimpleTuner"],
)
def test_the_names_of_other_tools_mean_the_same_modules(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    ours = (f"unet.{BLOCK}.attn1.to_q", f"text_encoder.{TEXT}", f"text_encoder_2.{TEXT}")
    tensors = {key: value for name in names for key, value in lora(name).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    target = tmp_path / "m.safetensors"
    assert (
        load_tool("merge_adapters").main([str(tmp_path / "a.safetensors"), "-o", str(target)]) == 0
    )
    got = read_lora(target).total
    assert set(got) == set(ours[: len(names)])
    for name, module in zip(names, ours, strict=False):
        torch.testing.assert_close(got[module].dense(), update(tensors, name))


def test_embeddings_in_a_bundle_are_named_and_the_rest_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = {f"bundle_emb.sks toy.clip_{x}": torch.randn(2, 8) for x in "lg"}
    save_file({**lora(FLAT), **bundle}, tmp_path / "a.safetensors")
    target = tmp_path / "m.safetensors"
    assert (
        load_tool("merge_adapters").main([str(tmp_path / "a.safetensors"), "-o", str(target)]) == 0
    )
    assert "sks toy" in caplog.text
    assert len(read_lora(target).total) == 1


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("on_input", "IA3"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("w_norm", "norms"),
        ("diff", "a norm"),
        ("diff_b", "a norm"),
    ],
)
def test_kinds_that_are_not_read_are_called_by_their_names(
    tmp_path: Path, part: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = FLAT.replace("attn1_to_q", "norm1") if part.startswith("diff") else FLAT
    extra = {f"{name}.{part}": torch.randn(8)}
    save_file(extra, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "m.safetensors")]
    assert load_tool("merge_adapters").main(arguments) != 0
    error = capsys.readouterr().err
    assert words in error
    assert_one_error(error)


SD_1 = {
    "a block that SDXL has not": (lora(FLAT.replace("down_blocks_1", "up_blocks_3")), {}),
    "a width of SD 1": (lora(FLAT.replace("attn1_to_q", "attn2_to_k"), 640, 768), {}),
    "a level of SD 1": (lora(FLAT.replace("down_blocks_1", "up_blocks_1"), 1280, 1280), {}),
    "its own header": (lora(FLAT, 640, 640), {"ss_base_model_version": "sd_v1"}),
    "its model spec": (lora(FLAT), {"modelspec.architecture": "stable-diffusion-v1/lora"}),
}


@pytest.mark.parametrize("tool", ["merge_adapters", "export"])
@pytest.mark.parametrize("case", SD_1)
def test_a_lora_of_sd_1_is_not_passed_on_as_one_of_sdxl(
    tmp_path: Path, tool: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = SD_1[case]
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    target = tmp_path / "m.safetensors"
    assert load_tool(tool).main([str(tmp_path / "a.safetensors"), "-o", str(target)]) != 0
    assert "SDXL" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_two_bases_are_one_line_in_merge_and_conflicts(
    tmp_path: Path, quiet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, inputs in zip(files, (8, 10), strict=True):
        save_file(lora(FLAT, 12, inputs), file)
    named = [str(file) for file in files]
    assert load_tool("merge_adapters").main([*named, "-o", str(tmp_path / "m"), *quiet]) != 0
    assert "belong to different bases" in capsys.readouterr().err
    assert load_tool("conflicts").main(named) != 0
    assert "belong to different bases" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["merge_adapters", "export"])
@pytest.mark.parametrize("name", ["x.ckpt", "x.pt"])
def test_no_safetensors_under_a_pickles_name(
    tmp_path: Path, tool: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(lora(FLAT), tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(tmp_path / name)]
    assert load_tool(tool).main(arguments) != 0
    assert "x.safetensors" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_chain_that_another_tool_mixed_has_no_shares_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """resize_lora writes the sum's singular vectors and keeps our header, its hash renewed."""
    tool = load_tool("export")
    save_file(lora(FLAT), tmp_path / "plain.safetensors", CHAIN)
    chain, out = tmp_path / "chain.safetensors", str(tmp_path / "o.safetensors")
    assert tool.main([str(tmp_path / "plain.safetensors"), "-o", str(chain)]) == 0
    assert tool.main([str(chain), "-o", out, "--weights", "can=0"]) == 0
    tensors = load_file(chain)
    with safe_open(chain, "pt") as file:
        metadata = file.metadata()
    down, up = (next(k for k in tensors if f"lora_{side}" in k) for side in ("down", "up"))
    u, s, vh = torch.linalg.svd(tensors[up] @ tensors[down], full_matrices=False)
    tensors[up], tensors[down] = (u[:, :4] * s[:4]).contiguous(), vh[:4].contiguous()
    mixed = tmp_path / "mixed.safetensors"
    save_file(tensors, mixed, {k: v for k, v in metadata.items() if k != "sshs_model_hash"})
    capsys.readouterr()
    assert tool.main([str(mixed), "-o", out, "--weights", "can=0"]) != 0
    assert "mixed by another tool" in capsys.readouterr().err
