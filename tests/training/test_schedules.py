"""Learning-rate schedules against diffusers' and transformers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.optimization
import pytest
import torch
import transformers.optimization
from torch import nn

from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.training.schedules import RateSchedule, count_warmup, make_multiplier

TOTAL = 40
RATE = 1e-4
Make = Callable[[torch.optim.Optimizer], Any]


def reference(make: Make, steps: int = TOTAL) -> list[float]:
    """The factor of the rate at each optimizer step, stepped as a training loop does."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"] / RATE)
        optimizer.step()
        scheduler.step()
    return factors


def ours(steps: int = TOTAL, **options: Any) -> list[float]:
    multiplier = make_multiplier(RateSchedule.of(Options(learning_rate=RATE, **options)), TOTAL)
    return [multiplier(step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"lr_scheduler_num_cycles": 1}, {"num_cycles": 1}),
        ("cosine_with_restarts", {"lr_scheduler_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_scheduler_power": 1.0}, {"power": 1.0}),
        ("polynomial", {"lr_scheduler_power": 2.5}, {"power": 2.5}),
    ],
)
def test_schedules_equal_diffusers(
    name: str, options: dict[str, Any], more: dict[str, Any], warmup: int
) -> None:
    expected = reference(
        lambda optimizer: diffusers.optimization.get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, **more
        )
    )
    got = ours(lr_scheduler=name, lr_warmup_steps=warmup, **options)
    assert got == pytest.approx(expected, abs=1e-12)


def test_constant_is_one() -> None:
    expected = reference(lambda o: diffusers.optimization.get_scheduler("constant", o))
    assert ours(lr_scheduler="constant") == expected == [1.0] * TOTAL


def test_piecewise_constant_equals_diffusers() -> None:
    rules = "1:10,0.1:20,0.01:30,0.005"
    expected = reference(
        lambda o: diffusers.optimization.get_scheduler("piecewise_constant", o, step_rules=rules)
    )
    got = ours(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules={rules}",))
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("timescale", [None, 25])
def test_inverse_sqrt_equals_transformers(warmup: int, timescale: int | None) -> None:
    expected = reference(
        lambda o: transformers.optimization.get_inverse_sqrt_schedule(o, warmup, timescale)
    )
    got = ours(
        lr_scheduler="inverse_sqrt", lr_warmup_steps=warmup, lr_scheduler_timescale=timescale
    )
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_cosine_with_min_lr_equals_transformers(warmup: int, least: float) -> None:
    expected = reference(
        lambda o: transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(
            o, warmup, TOTAL, min_lr_rate=least
        )
    )
    got = ours(
        lr_scheduler="cosine_with_min_lr",
        lr_warmup_steps=warmup,
        lr_scheduler_min_lr_ratio=least,
    )
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("decay", [5, 12])
@pytest.mark.parametrize("least", [None, 0.1])
def test_warmup_stable_decay_equals_transformers(
    warmup: int, decay: int, least: float | None
) -> None:
    expected = reference(
        lambda o: transformers.optimization.get_wsd_schedule(
            o, warmup, decay, TOTAL, min_lr_ratio=least or 0.0
        )
    )
    got = ours(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_scheduler_min_lr_ratio=least,
    )
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_schedules_stay_at_their_end_when_a_run_goes_on(name: str) -> None:
    schedule = RateSchedule.of(Options(learning_rate=RATE, lr_scheduler=name))
    multiplier = make_multiplier(schedule, TOTAL)
    assert multiplier(TOTAL) == pytest.approx(multiplier(TOTAL + 50))
    assert multiplier(TOTAL) <= 1e-7 / RATE + 1e-12


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.1, 4), (0.25, 10), (1, 1), (12, 12)])
def test_a_warm_up_below_one_is_a_share_of_the_steps(value: float, steps: int) -> None:
    assert count_warmup(value, TOTAL) == steps
    by_share = ours(lr_scheduler="cosine", lr_warmup_steps=value)
    assert by_share == ours(lr_scheduler="cosine", lr_warmup_steps=steps)


def test_a_schedule_is_a_pure_function_of_the_step() -> None:
    schedule = RateSchedule(name="cosine", warmup=3)
    multiplier = make_multiplier(schedule, TOTAL)
    forward = [multiplier(s) for s in range(TOTAL)]
    assert [multiplier(s) for s in reversed(range(TOTAL))] == forward[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "use constant_with_warmup"),
        ({"lr_scheduler": "cosinus"}, "lr_scheduler = 'cosinus' is not known"),
        ({"lr_scheduler": "piecewise_constant"}, "needs lr_scheduler_args"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1-10",)},
            "should read like",
        ),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_multiplier(RateSchedule.of(Options(**options)), TOTAL)
