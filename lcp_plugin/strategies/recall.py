"""Recall: the model as it was carried teaches what it knew, while the next task is learned.

Before task t trains, the carried model eps_carry draws images of every earlier task, in latent
space, from that task's own prompts and from the concept in other settings. All states of these
drawings are kept: x_s, its time s, and eps_carry(x_s, s, c). In training each step adds

    weight * mean || eps_theta(x_s, s, c) - eps_carry(x_s, s, c) ||^2

over a batch of them: learning without forgetting (Li & Hoiem, arXiv 1606.09282) on what the model
itself generates (deep generative replay, arXiv 1705.08690). The states of a drawing serve as
examples as they are, so the teacher makes no pass in training.

Only strings cross a boundary beside the carry's weights: no earlier image, no earlier adapter.
What crosses it otherwise, and where the next task starts, is the business of another strategy,
`of`: with `naive` one adapter of constant rank, however many tasks; with `merge_init` their sum.

With `preserve` = p > 0, a share p of the batch holds drawings of the untouched base of what no task
names: the tasks' class words ("a photo of a robot") and everyday prompts. Their teacher is eps_0,
so that the rest of the model stays (class images of DreamBooth, arXiv 2208.12242, for a chain).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import (
    Carry,
    Model,
    Rehearsal,
    Step,
    Strategy,
    TaskStart,
    Weights,
)
from lcp_plugin.lora import check_init
from lcp_plugin.strategies.naive import Naive
from lcp_plugin.strategies.recall_bank import Bank, Drawing, choose_state, draw_states
from lcp_plugin.strategies.recall_prompts import class_prompts, everyday_prompts, prompts_of
from lcp_plugin.tasks import Task


class Recall(Strategy):
    """Any strategy, with earlier concepts rehearsed: the carried model draws them and teaches them.

    weight of the rehearsal beside the task's loss; images drawn of each earlier task, in
    sample_steps steps with guidance; rehearsed at every `every`-th step in batches of `batch` (0:
    as large as the task's own), of at least `per_task` for each earlier task; settings: share of
    the images that show the concept elsewhere; preserve: share of the batch that keeps class words
    and everyday prompts as the base draws them; init: how the other strategy draws a fresh A, where
    it lets one choose.
    """

    name = "recall"

    def __init__(
        self,
        of: Strategy | type[Strategy] = Naive,
        weight: float = 1.0,
        images: int = 8,
        sample_steps: int = 12,
        guidance: float = 1.5,
        every: int = 1,
        batch: int = 0,
        per_task: int = 0,
        settings: float = 0.5,
        preserve: float = 0.0,
        init: str = "",
    ) -> None:
        inner = of() if isinstance(of, type) else of
        if isinstance(inner, Recall):
            raise StrategyError("recall: of = recall rehearses twice; name another strategy.")
        for key, value in {"images": images, "sample_steps": sample_steps, "every": every}.items():
            if value < 1:
                raise StrategyError(f"recall: {key} = {value}; give at least 1.")
        for key, share in {"settings": settings, "preserve": preserve}.items():
            if not 0 <= share <= 1:
                raise StrategyError(f"recall: {key} = {share}; give a share from 0 to 1.")
        for key, number in {"batch": batch, "per_task": per_task, "weight": weight}.items():
            if number < 0:
                raise StrategyError(f"recall: {key} = {number}; it cannot be negative.")
        if inner.joins_tasks:
            raise StrategyError(
                f"recall: of = {inner.name} joins all tasks; nothing is left to rehearse."
            )
        if init:
            start_by(inner, init)
        self.inner = inner
        self.starts_from_parent = self.inner.starts_from_parent
        self.weight, self.images, self.sample_steps = weight, images, sample_steps
        self.guidance, self.every = guidance, every
        self.batch, self.per_task = batch, per_task
        self.settings, self.preserve = settings, preserve
        self.banks: list[list[Bank]] = []  # by task, then by latent size
        self.preserved: list[list[Bank]] = []  # of the base: class words, everyday prompts

    # What crosses the boundary is the other strategy's.

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """Where the other strategy starts."""
        return self.inner.begin_task(task, carry, spec)

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """What the other strategy carries."""
        return self.inner.end_task(task, carry, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The other strategy's; what was drawn is kept by the run while its task trains."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The other strategy's."""
        self.inner.load_state_dict(state)

    def before_backward(self, step: Step, loss: Tensor) -> Tensor:
        """The other strategy's penalty."""
        return self.inner.before_backward(step, loss)

    def before_optimizer_step(self, step: Step) -> None:
        """The other strategy's edit of the gradients."""
        self.inner.before_optimizer_step(step)

    def after_optimizer_step(self, step: Step) -> None:
        """The other strategy's edit of the factors."""
        self.inner.after_optimizer_step(step)

    def after_training(self, model: Model) -> None:
        """The other strategy's last look."""
        self.banks, self.preserved = [], []
        self.inner.after_training(model)

    # Drawing and rehearsing

    def before_training(self, model: Model) -> None:
        """Draws what will be rehearsed, with the model as it was carried and with the base."""
        self.inner.before_training(model)
        sizes = list(model.sizes())[: self.images]
        share = max(1, round(self.images / len(sizes)))
        known, base = self._plan_tasks(model, share), self._plan_base(model, share)
        drawings = model.progress([*known, *base], "drawing what is rehearsed")
        banks = [[self._bank(model, drawing, size) for size in sizes] for drawing in drawings]
        self.banks, self.preserved = banks[: len(known)], banks[len(known) :]

    def _plan_tasks(self, model: Model, images: int) -> list[Drawing]:
        """What is drawn of each earlier task: `images` at a size."""
        index = model.task.index
        weights: Weights = "trained" if self.starts_from_parent else "carry"
        return [
            Drawing(f"{r.index:02d}", prompts_of(r, index, images, self.settings), weights)
            for r in model.learned
        ]

    def _plan_base(self, model: Model, images: int) -> list[Drawing]:
        """What is drawn of the base: class words of all tasks so far, and everyday prompts."""
        if self.preserve == 0:
            return []
        classes = class_prompts([*model.learned, model.task]) * images_of_class(images)
        everyday = everyday_prompts(model.task.index, images)
        plans = {"classes": classes, "everyday": everyday}
        return [Drawing(name, prompts, "base") for name, prompts in plans.items() if prompts]

    def count_images(self, tasks: int) -> float:
        """Images that a chain of `tasks` objects draws, those of the base included."""
        earlier = self.images * tasks * (tasks - 1) / 2
        classes = images_of_class(self.images) * tasks * (tasks + 1) / 2
        return earlier + (classes + self.images * tasks if self.preserve else 0)

    def count_rows(self, own: int, earlier: int) -> int:
        """Examples of a step whose task has a batch of `own`, with so many earlier tasks."""
        return max(self.batch or own, self.per_task * earlier)

    def _bank(self, model: Model, drawing: Drawing, size: tuple[int, int]) -> Bank:
        """The drawings of a task at a size, its prompts in turn."""
        name = f"{drawing.name}_{size[0]}x{size[1]}"
        kept = model.keep(name, lambda: self._draw(model, name, drawing, size))
        unique = tuple(dict.fromkeys(drawing.prompts))
        return Bank(unique, model.encode_prompts(unique, size), **kept)

    def _draw(
        self, model: Model, name: str, drawing: Drawing, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        noise = model.generator(f"rehearsal {name}")
        return draw_states(model, drawing, size, (self.sample_steps, self.guidance), noise)

    def rehearse(self, step: Step) -> Rehearsal | None:
        """A batch over all earlier tasks in equal parts, and its share of the base, at one of the
        sizes. Where nothing was learned yet it holds that share alone, at that share of the weight.
        """
        every = self.banks or self.preserved
        if not every or step.index % self.every:
            return None
        size = int(torch.randint(len(every[0]), (), generator=step.generator))
        known, base = ([bank[size] for bank in banks] for banks in (self.banks, self.preserved))
        rows = self.count_rows(len(step.batch["time_ids"]), len(known))
        preserved = self._share_of_base(rows, step.generator)
        banks = [known] * (rows - preserved if known else 0) + [base] * preserved
        chosen = [choose_state(of, step.generator) for of in banks]
        told = [bank.tell(place) for bank, place in chosen]
        return Rehearsal(
            latents=torch.stack([bank.latents[place] for bank, place in chosen]).float(),
            timesteps=torch.stack([bank.timesteps[place] for bank, place in chosen]),
            conditioning={key: torch.stack([c[key] for _, c in told]) for key in told[0][1]},
            target=torch.stack([bank.predictions[place] for bank, place in chosen]).float(),
            weight=self.weight * self.every * (1 if known else self.preserve),
            prompts=[prompt for prompt, _ in told],
        )

    def _share_of_base(self, rows: int, generator: Generator) -> int:
        """How many rows are the base's: `preserve` of them, on the mean where it is no whole
        number; at least one where nothing else is rehearsed.
        """
        if not self.preserved:
            return 0
        if not self.banks:
            return max(1, round(rows * self.preserve))
        return int(rows * self.preserve + float(torch.rand((), generator=generator)))


def start_by(inner: Strategy, init: str) -> None:
    """Has a strategy draw a fresh A by `init`. StrategyError for one with a start of its own."""
    if not isinstance(getattr(inner, "init", None), str):
        raise StrategyError(f"recall: init = {init}; {inner.name} starts A its own way.")
    setattr(inner, "init", check_init(init))  # noqa: B010, an attribute that not every strategy has


def images_of_class(images: int) -> int:
    """Images of each class word, where a task has `images`."""
    return max(1, images // 4)
