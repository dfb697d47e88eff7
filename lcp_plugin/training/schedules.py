"""The learning rates of a task, step by step: a built-in schedule, or anyone's scheduler class.

Both are functions of the step alone: nothing to save, nothing to resume wrongly. A built-in one
multiplies every group's rate by m(s) at optimizer step s (from 0) of T, warm-up w, decay d. Names
and formulas are those of diffusers' and transformers' schedulers, which kohya's lr_scheduler names:

    constant               1
    constant_with_warmup   min(1, s / w)
    linear, cosine         from w to T down to 0
    polynomial             likewise, down to 1e-7
    cosine_with_restarts   hard restarts, lr_scheduler_num_cycles of them
    inverse_sqrt           sqrt(t0 / (s + t0 - w)), t0 = lr_scheduler_timescale or w
    cosine_with_min_lr     cosine down to lr_scheduler_min_lr_ratio
    warmup_stable_decay    up over w from lr_scheduler_min_lr_ratio, 1, cosine down to it over d
    piecewise_constant     lr_scheduler_args with step_rules=1:10,0.1:20,0.01

A class given by lr_scheduler_type (a name in torch.optim.lr_scheduler or package.mod.Class, as in
kohya's trainer) is stepped anew on an idle optimizer of its own that has the same groups.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.training.optimizer_args import parse_arguments

CHECKED_STEPS = 10_000  # of a scheduler class, half a second
POLYNOMIAL_END = 1e-7  # of diffusers' polynomial schedule, absolute

Course = Callable[[int], list[float]]  # step (from 0) -> a rate for each group


@dataclass(frozen=True)
class RateSchedule:
    """How rates change within a task: a built-in schedule by name, or a class by its path."""

    name: str = "constant"
    class_path: str = ""  # of a scheduler class, which then holds instead of the name
    arguments: tuple[str, ...] = ()  # key=value, of the class or of piecewise_constant
    warmup: float = 0.0  # steps; a share of all below 1
    decay: float = 0.0  # likewise, of warmup_stable_decay; 0: a tenth of what follows the warm-up
    cycles: int = 1  # of cosine_with_restarts
    power: float = 1.0  # of polynomial
    timescale: int | None = None  # of inverse_sqrt, steps; None: the warm-up's
    lowest: float = 0.0  # share that cosine_with_min_lr and warmup_stable_decay end at
    rate: float = 1.0  # that polynomial's absolute end is a share of

    @classmethod
    def of(cls, options: Options) -> RateSchedule:
        """What the options ask for."""
        return cls(
            name=options.lr_scheduler,
            class_path=options.lr_scheduler_type,
            arguments=options.lr_scheduler_args,
            warmup=options.lr_warmup_steps,
            decay=options.lr_decay_steps,
            cycles=options.lr_scheduler_num_cycles,
            power=options.lr_scheduler_power,
            timescale=options.lr_scheduler_timescale,
            lowest=options.lr_scheduler_min_lr_ratio or 0.0,
            rate=options.learning_rate or 1.0,
        )


def count_warmup(value: float, total: int) -> int:
    """Steps that an option means: a share of the total below 1, else steps."""
    return round(value * total) if 0 < value < 1 else int(value)


def make_multiplier(schedule: RateSchedule, total: int) -> Callable[[int], float]:
    """step (from 0) -> the factor of the learning rate.

    Raises:
        ConfigError: an unknown schedule, arguments that it has not, or constant with a warm-up.
    """
    name = schedule.name
    if schedule.arguments and name != "piecewise_constant":
        raise ConfigError(
            f"lr_scheduler = '{name}' takes no lr_scheduler_args, got {schedule.arguments[0]!r}; "
            "they are for the class of lr_scheduler_type, and for piecewise_constant."
        )
    warmup = count_warmup(schedule.warmup, total)
    if name in ("constant", "adafactor"):
        if warmup and name == "constant":
            raise ConfigError(
                f"lr_warmup_steps = {schedule.warmup:g} has no effect on lr_scheduler = "
                "'constant'; use constant_with_warmup."
            )
        return lambda step: 1.0
    if name == "piecewise_constant":
        return _piecewise(schedule.arguments)
    if name == "inverse_sqrt":
        scale = schedule.timescale or warmup or 10_000
        return lambda step: (
            step / warmup if step < warmup else math.sqrt(scale / (step + scale - warmup))
        )
    shape = _shapes(schedule, total, warmup).get(name)
    if shape is None:
        raise ConfigError(f"lr_scheduler = '{name}' is not known; use constant, cosine, linear ...")
    span = max(1, total - warmup)
    lowest = schedule.lowest if name == "warmup_stable_decay" else 0.0

    def multiplier(step: int) -> float:
        if step < warmup:
            return lowest + (1 - lowest) * step / warmup
        return shape(min(1.0, (step - warmup) / span))

    return multiplier


def _shapes(schedule: RateSchedule, total: int, warmup: int) -> dict[str, Callable[[float], float]]:
    """name -> factor at a share of the way from the warm-up to the end."""
    least = schedule.lowest
    end = POLYNOMIAL_END / schedule.rate
    decay = count_warmup(schedule.decay, total) or max(1, (total - warmup) // 10)
    stable = max(0.0, 1 - decay / max(1, total - warmup))

    def cosine(share: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * share))

    def restarts(share: float) -> float:
        return 0.0 if share >= 1 else cosine((schedule.cycles * share) % 1.0)

    def stable_decay(share: float) -> float:
        if share <= stable:
            return 1.0
        return least + (1 - least) * cosine((share - stable) / (1 - stable))

    return {
        "constant_with_warmup": lambda share: 1.0,
        "linear": lambda share: 1 - share,
        "cosine": cosine,
        "cosine_with_restarts": restarts,
        "polynomial": lambda share: (1 - end) * (1 - share) ** schedule.power + end,
        "cosine_with_min_lr": lambda share: least + (1 - least) * cosine(share),
        "warmup_stable_decay": stable_decay,
    }


def _piecewise(arguments: Sequence[str]) -> Callable[[int], float]:
    rules = [a.partition("=")[2] for a in arguments if a.startswith("step_rules=")]
    if not rules:
        raise ConfigError(
            "lr_scheduler = 'piecewise_constant' needs lr_scheduler_args = "
            '["step_rules=1:10,0.1:20,0.01"] (factor:until step, ..., last factor).'
        )
    *parts, last = rules[0].strip("'\"").split(",")
    try:
        pairs = [(float(part.split(":")[0]), int(part.split(":")[1])) for part in parts]
        final = float(last)
    except (IndexError, ValueError) as error:
        raise ConfigError(
            f"step_rules = '{rules[0]}' should read like 1:10,0.1:20,0.01."
        ) from error
    return lambda step: next((factor for factor, until in pairs if step < until), final)


def make_course(schedule: RateSchedule, total: int, rates: Sequence[float]) -> Course:
    """The rates of every step, `rates` being those of the groups.

    Raises:
        ConfigError: an unknown schedule, or a class that cannot be used.
    """
    if schedule.class_path:
        return _ClassCourse(schedule.class_path, schedule.arguments, rates)
    multiplier = make_multiplier(schedule, total)
    return lambda step: [rate * multiplier(step) for rate in rates]


def check_schedule(schedule: RateSchedule, steps: int = 100) -> None:
    """Raises ConfigError for a schedule that does not last a task of `steps` (at most
    `CHECKED_STEPS` are tried), before there is a model.
    """
    course = make_course(schedule, steps, (1.0,))
    course(min(steps, CHECKED_STEPS) - 1)


class _ClassCourse:
    """A scheduler class, stepped as far as asked for."""

    def __init__(self, path: str, arguments: Sequence[str], rates: Sequence[float]) -> None:
        self._make, self._name = _find_class(path), path
        self._args, self._rates = parse_arguments(arguments), rates
        self._start()

    def _start(self) -> None:
        groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in self._rates]
        self._optimizer, self._done = torch.optim.SGD(groups, lr=0.0), 0
        try:
            self._scheduler = self._make(self._optimizer, **self._args)
        except Exception as error:  # anyone's class, which raises anything
            raise ConfigError(f"lr_scheduler_args do not fit {self._name}: {error}") from error

    def __call__(self, step: int) -> list[float]:
        if step < self._done:
            self._start()
        while self._done < step:
            self._optimizer.step()
            try:
                self._scheduler.step()
            except TypeError as error:
                raise ConfigError(
                    f"lr_scheduler_type = '{self._name}' wants more than the step's number "
                    f"({error}); use a schedule of the step alone."
                ) from error
            except Exception as error:
                raise ConfigError(
                    f"lr_scheduler_args do not fit {self._name}, which fails at step "
                    f"{self._done + 1}: {error}"
                ) from error
            self._done += 1
        return [float(group["lr"]) for group in self._optimizer.param_groups]


def _find_class(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(
            importlib.import_module(module or "torch.optim.lr_scheduler"), attribute
        )
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"lr_scheduler_type = '{name}' cannot be imported ({error}); wanted a name in "
            "torch.optim.lr_scheduler or package.mod.Class."
        ) from error
    return found
