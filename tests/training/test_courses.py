"""Captions, predictions, schedules and clipping as a run's options ask for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import first_adapter, losses_of, rates_of

from lcp_plugin.errors import LcpError
from lcp_plugin.formats.tensors import read_header

Train = Callable[..., Any]


def test_max_grad_norm_clips(train: Train) -> None:
    given = {"tasks": (0,), "optimizer_type": "SGD", "optimizer_args": ["momentum=0"]}
    sizes = []
    for name, limit in (("free", 0), ("clipped", 1e-4)):
        adapter = first_adapter(train(name, max_grad_norm=limit, max_train_steps=1, **given))
        sizes.append(sum(float(f.up.square().sum()) for f in adapter.values()) ** 0.5)
    # one SGD step from B = 0, where A has no gradient: ||B|| = rate * ||gradient||
    assert sizes[1] == pytest.approx(1e-2 * 1e-4, rel=1e-2)
    assert sizes[0] > 10 * sizes[1]


# -------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "options", [{"max_token_length": 150}, {"weighted_captions": True}], ids=["long", "weighted"]
)
def test_captions_may_be_long_and_weighted(
    make_base: Callable[..., Any], options: dict[str, Any]
) -> None:
    text = "a (dog:1.5)" if "weighted_captions" in options else "a dog " * 60
    plain = make_base().encode_prompts([text])["encoder_hidden_states"]
    found = make_base(**options).encode_prompts([text])["encoder_hidden_states"]
    assert found.shape[1] == (152 if "max_token_length" in options else 77)
    assert not torch.allclose(found[:, :77], plain, atol=1e-3)


def test_a_run_trains_on_long_captions(train: Train, pictures: Path) -> None:
    (pictures / "disc0" / "00.txt").write_text("a disc of many words, " * 30)
    common = {"tasks": (0,), "caption_extension": ".txt", "max_train_steps": 4}
    short, long = train("short", **common), train("long", max_token_length=225, **common)
    assert losses_of(short) != losses_of(long)


# ---------------------------------------------------------------------------- loss and schedules


def test_output_preservation_holds_what_the_model_said(
    train: Train, pictures: Path, tmp_path: Path
) -> None:
    def dataset(preserve: bool) -> dict[str, Any]:
        subset = {"image_dir": "disc0", "class_tokens": "disc"}
        if preserve:
            subset = {**subset, "custom_attributes": {"diff_output_preservation": True}}
        return {
            "name": "disc0",
            "kind": "object",
            "concept": "disc",
            "datasets": [{"subsets": [subset]}],
        }

    free = train("free", tasks=[dataset(False)])
    held = train("held", tasks=[dataset(True)])
    assert losses_of(free)[0] > 1e-3
    assert losses_of(held)[0] < 1e-9  # at step 0 the model says what it said before the task
    size = [max(float(f.update().norm()) for f in first_adapter(r).values()) for r in (free, held)]
    assert size[1] < 1e-3 * size[0]


def test_v_prediction_is_recognised_from_the_base(
    train: Train, toy_base: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "v_base"
    shutil.copytree(toy_base, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"})
    )
    run = train("run", tasks=(0,), pretrained_model_name_or_path=str(other))
    assert any("predicts v" in line for line in run.facts["said"])
    given = train("given", tasks=(0,), v_parameterization=True)
    assert losses_of(run) == losses_of(given)
    assert not any("predicts v" in line for line in given.facts["said"])
    header = read_header(run.store.deliverable).metadata
    assert header["modelspec.prediction_type"] == "v"


def test_v_prediction_and_zero_terminal_snr_hold_for_samples_too(
    make_base: Callable[..., Any],
) -> None:
    held = make_base(v_parameterization=True, zero_terminal_snr=True)
    scheduler = held.pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert float(held.schedule.alphas[-1]) == pytest.approx(0, abs=1e-9)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert float(make_base().schedule.alphas[-1]) > 1e-3


def test_anyones_scheduler_sets_the_rates_and_a_resumed_run_agrees(
    train: Train, tmp_path: Path
) -> None:
    options = {
        "lr_scheduler_type": "torch.optim.lr_scheduler.StepLR",
        "lr_scheduler_args": ["step_size=2", "gamma=0.1"],
        "learning_rate": 1e-2,
    }
    run = train(
        "run", tasks=(0,), max_train_steps=5, save_state=True, save_every_n_steps=3, **options
    )
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-4]
    assert rates_of(run) == pytest.approx(expected)
    state = str(tmp_path / "out" / "run-step00000003-state")
    again = train("again", tasks=(0,), max_train_steps=5, resume=state, **options)
    assert rates_of(again) == pytest.approx(expected[3:])


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"lr_scheduler_type": "nothing.Here"}, "cannot be imported"),
        ({"lr_scheduler_type": "StepLR"}, "do not fit"),
        (
            {
                "lr_scheduler_type": "ReduceLROnPlateau",
                "lr_scheduler_args": ("mode='min'",),
            },
            "more than the step",
        ),
    ],
    ids=["unknown", "arguments", "metric"],
)
def test_a_scheduler_that_cannot_be_used_is_one_line(given: dict[str, Any], word: str) -> None:
    from lcp_plugin.config.options import Options
    from lcp_plugin.training.schedules import RateSchedule, make_course

    with pytest.raises(LcpError, match=word):
        make_course(RateSchedule.of(Options(**given)), 10, [1.0])(1)


def test_schedule_free_optimizers_are_told_which_weights_are_wanted() -> None:
    from lcp_plugin.training.optimizers import set_mode

    class Free:
        modes: Sequence[str] = ()

        def train(self) -> None:
            self.modes = (*self.modes, "train")

        def eval(self) -> None:
            self.modes = (*self.modes, "eval")

    optimizer = Free()
    set_mode(optimizer, "train")
    set_mode(optimizer, "eval")
    set_mode(object(), "eval")  # others have one set
    assert optimizer.modes == ("train", "eval")
