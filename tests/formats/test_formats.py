"""LoRA files of every layout: exact round trips, with diffusers and peft as the judges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import OUT, Q, factors, fused, image, mixed_adapter, random_adapter, same_factors

from lcp_plugin.adapter import Adapter
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import LAYOUTS, portable_adapter, read_lora, write_lora
from lcp_plugin.formats.tensors import read_header


@pytest.fixture(scope="module")
def toy() -> Any:
    from lcp_plugin.tiny.architecture import build_toy

    return build_toy()


def unet_only(adapter: Adapter) -> Adapter:
    return adapter.restrict(name for name in adapter if name.startswith("unet."))


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_alphas_ranks_and_kernels_survive(tmp_path: Path, layout: str) -> None:
    adapter = mixed_adapter() if layout != "peft" else unet_only(mixed_adapter())
    write_lora(tmp_path / "a.safetensors", adapter, {"ss_x": "1"}, layout=layout)
    back = read_lora(tmp_path / "a.safetensors")
    assert same_factors(back.adapter, adapter)
    assert back.format == layout
    assert back.metadata["ss_x"] == "1"
    assert len(back.delta) == 0


def test_kohya_to_diffusers_to_peft_to_kohya_is_exact(tmp_path: Path) -> None:
    first = unet_only(mixed_adapter())
    adapter = first
    write_lora(tmp_path / "start.safetensors", adapter)
    for layout in ("diffusers", "peft", "kohya"):
        write_lora(tmp_path / "next.safetensors", adapter, layout=layout)
        adapter = read_lora(tmp_path / "next.safetensors").adapter
    assert same_factors(adapter, first)
    hashes = [file_model_hash(tmp_path / f"{n}.safetensors") for n in ("start", "next")]
    assert hashes[0] == hashes[1]


def test_an_alpha_that_fp32_would_round_is_kept(tmp_path: Path) -> None:
    adapter = Adapter({Q: factors((4, 4), 2, 0.7, 0)})
    write_lora(tmp_path / "a.safetensors", adapter)
    assert read_lora(tmp_path / "a.safetensors").adapter[Q].alpha == 0.7


def test_alpha_is_exact_in_a_half_precision_file(tmp_path: Path) -> None:
    adapter = Adapter({Q: factors((4, 650), 650, 650.0, 0)})  # 650 is no bf16 number
    write_lora(tmp_path / "a.safetensors", adapter, dtype=torch.bfloat16)
    back = read_lora(tmp_path / "a.safetensors").adapter[Q]
    assert back.alpha == 650.0
    assert torch.equal(back.down, adapter[Q].down.bfloat16().float())


def test_kohya_files_carry_kohyas_hash_of_their_tensors(tmp_path: Path) -> None:
    written = write_lora(tmp_path / "a.safetensors", mixed_adapter(), {"ss_x": "1"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == written
    assert written["sshs_model_hash"] == file_model_hash(tmp_path / "a.safetensors")
    assert len(written["sshs_legacy_hash"]) == 8


def test_peft_folders_hold_one_model_each_and_say_which(tmp_path: Path) -> None:
    adapter = mixed_adapter()
    for model in ("unet", "text_encoder", "text_encoder_2"):
        part = adapter.restrict(n for n in adapter if n.startswith(f"{model}."))
        write_lora(tmp_path / model / "adapter_model.safetensors", part, layout="peft")
        assert same_factors(read_lora(tmp_path / model).adapter, part)
    with pytest.raises(FileFormatError, match="one model"):
        write_lora(tmp_path / "all.safetensors", adapter, layout="peft")


# ------------------------------------------------------------------- diffusers and peft as judges


TEXT_AND_ATTENTION = (".attn", ".self_attn", ".mlp")


@pytest.mark.parametrize("layout", ["kohya", "kohya_blocks", "diffusers"])
@pytest.mark.parametrize("mixed", [False, True])
def test_diffusers_images_equal_those_of_the_fused_model(
    tmp_path: Path, toy: Any, layout: str, mixed: bool
) -> None:
    import copy

    def rank_and_alpha(i: int) -> tuple[int, float]:
        return (2 + i % 3, [1.5, 4.0, 3.0][i % 3]) if mixed else (3, 1.5)

    adapter = random_adapter(
        toy, lambda name: any(part in name for part in TEXT_AND_ATTENTION), rank_and_alpha
    )
    wanted = image(fused(toy, Delta.of(adapter)))
    assert (wanted - image(toy)).abs().max() > 0.05  # it does something
    written = portable_adapter(adapter) if layout.startswith("kohya") else adapter
    write_lora(tmp_path / "a.safetensors", written, layout=layout)
    loaded = copy.deepcopy(toy)
    loaded.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert (image(loaded) - wanted).abs().max() < 1e-4


def test_diffusers_accepts_convolutions_too(tmp_path: Path, toy: Any) -> None:
    import copy

    adapter = random_adapter(
        toy, lambda name: name.startswith("unet.") and "_block" in name, lambda i: (2, 1.0)
    )
    write_lora(tmp_path / "a.safetensors", adapter)
    loaded = copy.deepcopy(toy)
    loaded.load_lora_weights(str(tmp_path / "a.safetensors"))
    wanted = image(fused(toy, Delta.of(adapter)))
    assert (image(loaded) - wanted).abs().max() < 1e-4


def test_a_dense_delta_of_two_sizes_is_a_lora_that_diffusers_reads(
    tmp_path: Path, toy: Any
) -> None:
    import copy

    attention = random_adapter(toy, lambda name: ".attn" in name, lambda i: (2, 2.0))  # 32 wide
    resnets = random_adapter(toy, lambda name: ".resnets." in name, lambda i: (2, 2.0))  # 16 too
    small = Adapter({**attention, **resnets})
    dense = Delta({n: Dense(f.update(), f.kernel) for n, f in small.items()})
    assert len({min(f.shape) for f in small.values()}) > 1
    write_lora(tmp_path / "a.safetensors", portable_adapter(dense.as_adapter()))
    loaded = copy.deepcopy(toy)
    loaded.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert (image(loaded) - image(fused(toy, dense))).abs().max() < 1e-4


def test_peft_reads_what_we_write_for_it(tmp_path: Path, toy: Any) -> None:
    import copy

    from peft import PeftModel

    adapter = random_adapter(
        toy,
        lambda name: name.startswith("unet.") and ".attn" in name,
        lambda i: (2 + i % 2, 1.5 + i % 3),
    )
    write_lora(tmp_path / "unet" / "adapter_model.safetensors", adapter, layout="peft")
    loaded = copy.deepcopy(toy)
    loaded.unet = PeftModel.from_pretrained(loaded.unet, str(tmp_path / "unet")).merge_and_unload()
    assert (image(loaded) - image(fused(toy, Delta.of(adapter)))).abs().max() < 1e-4


def test_what_peft_writes_is_read_with_its_alpha(tmp_path: Path, toy: Any) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    for rslora in (False, True):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=rslora)
        model = get_peft_model(copy.deepcopy(toy.unet), config)
        model.save_pretrained(str(tmp_path / "p"))
        back = read_lora(tmp_path / "p").adapter
        wanted = 6 / math.sqrt(4) if rslora else 6 / 4
        assert {f.scale for f in back.values()} == {wanted}
        assert all(name.endswith("to_q") for name in back)


def test_what_diffusers_writes_is_read(tmp_path: Path, toy: Any) -> None:
    import copy

    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = copy.deepcopy(toy)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k"]))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionXLPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=state)
    back = read_lora(tmp_path)
    assert back.format == "diffusers"
    assert {f.alpha for f in back.adapter.values()} == {2.0}
    assert len(back.adapter) == len(state) / 2


# ------------------------------------------------------------------------------ one alpha for all


def test_portable_factors_have_one_alpha_and_the_same_update() -> None:
    adapter = mixed_adapter()
    portable = portable_adapter(adapter)
    for model in ("unet.", "text_encoder.", "text_encoder_2."):
        assert len({f.alpha for n, f in portable.items() if n.startswith(model)}) == 1
    for name, f in adapter.items():
        wanted = f.alpha / f.rank * f.up.double() @ f.down.double()
        torch.testing.assert_close(portable[name].update().double(), wanted, rtol=1e-5, atol=1e-6)


def test_portable_factors_of_equal_alphas_are_the_same_object() -> None:
    adapter = Adapter({Q: factors((4, 4), 2, 8.0, 0), OUT: factors((4, 4), 3, 8.0, 1)})
    portable = portable_adapter(adapter)
    assert all(portable[name] is adapter[name] for name in adapter)
