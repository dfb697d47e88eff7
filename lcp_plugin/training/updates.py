"""From gradients to changed factors: the task's optimizer, its rates, clipping and norm limits."""

from __future__ import annotations

import torch

from lcp_plugin.sdxl.flat_factors import JoinedGroups
from lcp_plugin.sdxl.live_model import LiveStep
from lcp_plugin.sdxl.precision import allow_half_gradients
from lcp_plugin.sdxl.sites import limit_norms
from lcp_plugin.training.lesson import Classroom, Lesson
from lcp_plugin.training.modules import make_groups
from lcp_plugin.training.optimizers import OptimizerChoice, create_optimizer, set_mode
from lcp_plugin.training.schedules import RateSchedule, make_course


class Updates:
    """The optimizer of a lesson whose adapter is attached.

    `model` is what gradients go through; `parameters` are the factors that train, as attached.
    """

    def __init__(self, lesson: Lesson, room: Classroom, total: int) -> None:
        options, accelerator = lesson.options, room.accelerator
        self._options, self._strategy, self._adapted = options, room.strategy, room.base.adapted
        self._accelerator = accelerator
        choice = OptimizerChoice.of(options)
        groups = make_groups(self._adapted, options, room.weights)
        self.parameters = [p for group in groups for p in group["params"]]
        self._joined: JoinedGroups | None = None
        if self._adapted.flat is not None and choice.joins_exactly:
            self._joined = JoinedGroups(groups, self._adapted.flat)
            groups = self._joined.groups
        optimizer, self.optimizer_name = create_optimizer(choice, groups)
        self.model, self.optimizer = accelerator.prepare(self._adapted, optimizer)
        rates = [float(group.get("lr") or 0.0) for group in optimizer.param_groups]
        self._course = make_course(RateSchedule.of(options), total, rates)
        if options.full_fp16 and accelerator.scaler is not None:
            allow_half_gradients(accelerator.scaler)

    @property
    def rate(self) -> float:
        """The first group's learning rate."""
        return float(self.optimizer.param_groups[0].get("lr") or 0.0)

    def set_mode(self, mode: str) -> None:
        """train or eval, for optimizers that keep two sets of weights."""
        set_mode(self.optimizer, mode)

    def open(self) -> None:
        """Before the gradients of a step."""
        if self._joined is not None:
            self._joined.open()

    def apply(self, step: int, live: LiveStep) -> None:
        """One optimizer step (from 0), the strategy's edits around it."""
        optimizer = self.optimizer
        for group, rate in zip(optimizer.param_groups, self._course(step), strict=True):
            if group.get("lr") is not None:
                group["lr"] = rate
        self._adapted.forget_rounded()
        if self._joined is not None:
            self._joined.collect()
        self._accelerator.unscale_gradients(optimizer)
        self._strategy.before_optimizer_step(live)
        if self._options.max_grad_norm > 0:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self._options.max_grad_norm)  # unscaled above
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self._joined is not None:
            self._joined.clear()
        if self._options.scale_weight_norms:
            limit_norms(self._adapted.pair_of.values(), self._options.scale_weight_norms)
        with torch.no_grad():
            self._strategy.after_optimizer_step(live)
