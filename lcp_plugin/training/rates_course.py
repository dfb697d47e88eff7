"""The learning rates of a task, step by step: a built-in schedule, or anyone's scheduler class.

Both are functions of the step alone, so a resumed run needs no scheduler state: a class given by
lr_scheduler_type (a name in torch.optim.lr_scheduler or package.mod.Class, as in kohya's trainer)
is stepped anew on an optimizer of its own that has the same groups and trains nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.training.optimizers import parse_arguments
from lcp_plugin.training.schedules import make_multiplier

Course = Callable[[int], list[float]]  # step (from 0) -> a rate for each group


def make_course(options: Options, total: int, rates: Sequence[float]) -> Course:
    """The rates of every step, `rates` being those of the groups.

    Raises:
        ConfigError: an unknown schedule, or a class that cannot be used.
    """
    if options.lr_scheduler_type:
        return _ClassCourse(options, rates)
    multiplier = make_multiplier(options, total)
    return lambda step: [rate * multiplier(step) for rate in rates]


class _ClassCourse:
    """A scheduler class, stepped as far as asked for."""

    def __init__(self, options: Options, rates: Sequence[float]) -> None:
        self._make = _find_class(options.lr_scheduler_type)
        self._name = options.lr_scheduler_type
        self._args = parse_arguments(options.lr_scheduler_args)
        self._rates = rates
        self._start()

    def _start(self) -> None:
        groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in self._rates]
        self._optimizer, self._done = torch.optim.SGD(groups, lr=0.0), 0
        try:
            self._scheduler = self._make(self._optimizer, **self._args)
        except (TypeError, ValueError) as error:
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
