"""On a card: the same values as on the CPU, chains and resumed runs equal whole ones, the file is
the model. LCP_TEST_DEVICE=cpu tries the same without a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_runs import (
    DEVICE,
    EMBEDDED,
    Train,
    difference,
    read_losses,
    state_fact,
    train_on,
    training_on,
)
from toy_runs import read_all, under
from toy_unets import small_delta

from lcp_plugin.delta import Delta
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet, run_unet
from lcp_plugin.strategies import BUILT_IN
from lcp_plugin.tiny.architecture import build_toy

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LOSSES_AGREE = 1e-4  # relative, fp32 without TF32, every step
FACTORS_AGREE = 1e-2  # AdamW divides by gradients that are rounding alone in places
RUNS_AGREE = 1e-3  # the same card twice, kernels that add in any order


@pytest.fixture(autouse=True)
def _plain_fp32() -> Iterator[None]:
    """No TF32, in matrix products and in convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_a_card_computes_what_the_cpu_computes_step_by_step(train: Train, strategy: str) -> None:
    options = {**under(strategy), "max_train_steps": 3}
    there, here = (
        train_on(device, train, name, (0, 1), **options)
        for name, device in (("there", DEVICE), ("here", "cpu"))
    )
    pairs = list(zip(read_losses(there), read_losses(here), strict=True))
    apart = max(abs(a - b) / b for a, b in pairs)
    factors = difference(read_all(there.store), read_all(here.store))
    state_fact(f"card against CPU, {strategy}", {"losses": apart, "factors": factors})
    assert len(pairs) >= 3
    assert apart <= LOSSES_AGREE
    assert factors <= FACTORS_AGREE


CHAINED = ("naive", "merge_init", "merge_ortho_init", "magmax", "recall")


@pytest.mark.parametrize("strategy", CHAINED)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_chained_runs_equal_one_run(train: Train, strategy: str, precision: str) -> None:
    options = {**under(strategy), "mixed_precision": precision, "max_train_steps": 2}
    whole = train_on(DEVICE, train, "whole", (0, 1), **options)
    first = train_on(DEVICE, train, "first", (0,), **options)
    second = train_on(DEVICE, train, "second", (1,), prev=str(first.store.root), **options)
    apart = difference(read_all(second.store), read_all(whole.store))
    state_fact(f"chained against whole, {strategy}, {precision}", apart)
    assert second.store.folders()[-1].index == 2
    assert apart <= RUNS_AGREE


def test_weights_that_waited_for_a_boundary_come_back_to_the_bit() -> None:
    unet = build_toy().unet.to(DEVICE, torch.bfloat16)
    weights = [weight.clone() for weight in unet.parameters()]
    first, second = small_delta(unet, 1), small_delta(unet, 2)
    model = AdaptedUNet({"unet": unet})
    for delta in (first, Delta(), second, first, Delta()):
        model.set_base(delta, "fuse")
    assert all(map(torch.equal, unet.parameters(), weights))
    shares = model.set_base(second, "fuse")
    fused = [weight.clone() for weight in unet.parameters()]
    model.release()
    assert all(map(torch.equal, unet.parameters(), weights))
    assert model.set_base(second, "fuse") == shares
    assert all(map(torch.equal, unet.parameters(), fused))


class Killed(BaseException):
    """What nothing catches: the run ends where it stands."""


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    train: Train, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    from lcp_plugin.observers import JsonLines

    options = {
        **EMBEDDED,
        "optimizer_type": optimizer,
        "network_dropout": 0.2,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "resume_every_n_steps": 2,
    }
    whole = train_on(DEVICE, train, "whole", **options)
    write = JsonLines.on_step_end

    def kill(self: Any, run: Any, step: Any) -> None:
        write(self, run, step)
        if step.index == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "on_step_end", kill)
        with training_on(DEVICE), pytest.raises(Killed):
            train("run", tasks=(0,), **options)
    resumed = train_on(DEVICE, train, "run", **options)
    apart = difference(read_all(resumed.store), read_all(whole.store))
    state_fact(f"killed and resumed against whole, {optimizer}", apart)
    assert len(read_losses(resumed)) > 4, "it started anew or not at all"
    assert apart <= RUNS_AGREE


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_deliverable_is_the_model(train: Train, precision: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    from lcp_plugin.tiny import model_dir

    run = train_on(DEVICE, train, "run", (0, 1), strategy="merge_init", mixed_precision=precision)
    adapted, dtype = run.base.adapted.eval(), run.base.dtype
    fresh = StableDiffusionXLPipeline.from_pretrained(model_dir(), torch_dtype=dtype).to(DEVICE)
    fresh.load_lora_weights(str(run.store.deliverable))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad(), training_on(DEVICE):
        conditioning = {
            key: value.to(DEVICE)
            for key, value in run.base.encode_prompts(["a photo of sks0 disc"]).items()
        }
        conditioning["time_ids"] = torch.tensor([[48, 48, 0, 0, 48, 48.0]], device=DEVICE)
        latents = torch.randn(1, 4, 12, 12, generator=generator).to(DEVICE)
        inputs = latents, torch.tensor([400], device=DEVICE), conditioning, dtype
        ours, theirs = run_unet(adapted, *inputs), run_unet(fresh.unet, *inputs)
        fresh.unload_lora_weights()
        bare = run_unet(fresh.unet, *inputs)
    apart = float((ours - theirs).norm() / (ours - bare).norm())
    rounding = float((ours - theirs).norm() / ours.norm())
    state_fact(f"deliverable against model, {precision}", {"of update": apart, "of all": rounding})
    assert float((ours - bare).norm()) > 0
    assert rounding <= {"no": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[precision]
    assert precision != "no" or apart <= 1e-3
