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
`of`: with `naive`, one adapter of constant rank, however many tasks; with `merge_init`, the sum of
updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import (
    Carry,
    Conditioning,
    Model,
    Rehearsal,
    Step,
    Strategy,
    TaskStart,
    Weights,
)
from lcp_plugin.strategies.naive import Naive
from lcp_plugin.tasks import Task, TaskRecord

SETTINGS: Mapping[str, tuple[str, ...]] = {  # none of them is a prompt of the evaluation
    "object": (
        "a {concept} on the grass",
        "a {concept} in the snow",
        "a {concept} next to a big tree at night",
        "a {concept} in a blue hat and a red coat",
        "a {concept} on a wooden table",
        "a small {concept} at the beach",
    ),
    "style": (
        "{concept} image of a house",
        "{concept} image of a tree",
        "{concept} image of a person",
        "{concept} image of a boat",
        "{concept} image of a flower",
        "{concept} image of a street",
    ),
}
LARGEST_DRAWING = 4  # images drawn at once
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Bank:
    """What is rehearsed of one task at one latent size."""

    prompts: tuple[str, ...]
    conditioning: Conditioning  # a row for each prompt
    of_prompt: Tensor  # (n,): which of them a state was drawn from
    latents: Tensor  # (n, 4, h, w), fp16
    timesteps: Tensor  # (n,)
    predictions: Tensor  # (n, 4, h, w), fp16


class Recall(Strategy):
    """Any strategy, with earlier concepts rehearsed: the carried model draws them and teaches them.

    weight of the rehearsal beside the task's loss; images drawn of each earlier task, in
    sample_steps steps with guidance; rehearsed at every `every`-th step in batches of `batch` (0:
    as large as the task's own); settings: share of the images that show the concept elsewhere.
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
        settings: float = 0.5,
    ) -> None:
        inner = of() if isinstance(of, type) else of
        if isinstance(inner, Recall):
            raise StrategyError("recall: of = recall rehearses twice; name another strategy.")
        for key, value in {"images": images, "sample_steps": sample_steps, "every": every}.items():
            if value < 1:
                raise StrategyError(f"recall: {key} = {value}; give at least 1.")
        if not 0 <= settings <= 1 or batch < 0 or weight < 0:
            raise StrategyError(
                f"recall: settings = {settings}, batch = {batch}, weight = {weight}; settings is "
                "a share from 0 to 1, batch and weight are not negative."
            )
        if inner.joins_tasks:
            raise StrategyError(
                f"recall: of = {inner.name} joins all tasks; nothing is left to rehearse."
            )
        self.inner = inner
        self.starts_from_parent = self.inner.starts_from_parent
        self.weight, self.images, self.sample_steps = weight, images, sample_steps
        self.guidance, self.every, self.batch, self.settings = guidance, every, batch, settings
        self.banks: list[list[Bank]] = []  # by task, then by latent size

    # What crosses the boundary is the other strategy's.

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """As the other strategy."""
        return self.inner.begin_task(task, carry, spec)

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """As the other strategy."""
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
        self.banks = []
        self.inner.after_training(model)

    # Drawing and rehearsing

    def before_training(self, model: Model) -> None:
        """Draws what will be rehearsed, with the model as it was carried."""
        self.inner.before_training(model)
        sizes = list(model.sizes())[: self.images]
        share = max(1, round(self.images / len(sizes)))
        tasks = model.progress(model.learned, "drawing what is rehearsed")
        self.banks = [[self._bank(model, r, size, share) for size in sizes] for r in tasks]

    def _bank(self, model: Model, record: TaskRecord, size: tuple[int, int], images: int) -> Bank:
        """The drawings of a task at a size, its prompts in turn."""
        prompts = prompts_of(record, model.task.index, images, self.settings)
        name = f"{record.index:02d}_{size[0]}x{size[1]}"
        kept = model.keep(name, lambda: self._draw(model, name, prompts, size))
        unique = tuple(dict.fromkeys(prompts))
        return Bank(
            unique,
            model.encode_prompts(unique, size),
            kept["of_prompt"],
            kept["latents"],
            kept["timesteps"],
            kept["predictions"],
        )

    def _draw(
        self, model: Model, name: str, prompts: Sequence[str], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """An image for each prompt, every state of it; prompts that repeat are drawn together."""
        generator = model.generator(f"rehearsal {name}")
        parts: dict[str, list[Tensor]] = {}
        for number, prompt in enumerate(dict.fromkeys(prompts)):
            count = prompts.count(prompt)
            for begin in range(0, count, LARGEST_DRAWING):
                rows = min(LARGEST_DRAWING, count - begin)
                noise = torch.randn((rows, LATENT_CHANNELS, *size), generator=generator)
                weights: Weights = "trained" if self.starts_from_parent else "carry"
                drawn = model.draw(
                    prompt, noise, self.sample_steps, self.guidance, generator, weights
                )
                found = {
                    "latents": drawn.latents.half(),
                    "predictions": drawn.predictions.half(),
                    "timesteps": drawn.timesteps,
                    "of_prompt": torch.full_like(drawn.timesteps, number),
                }
                for key, value in found.items():
                    parts.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in parts.items()}

    def rehearse(self, step: Step) -> Rehearsal | None:
        """A batch over all earlier tasks in equal parts, at one of the sizes."""
        if not self.banks or step.index % self.every:
            return None
        size = int(torch.randint(len(self.banks[0]), (), generator=step.generator))
        banks = [bank[size] for bank in self.banks]
        rows = self.batch or len(step.batch["time_ids"])
        chosen = [_choose(banks, step.generator) for _ in range(rows)]
        prompt_rows = [(bank, int(bank.of_prompt[place])) for bank, place in chosen]
        return Rehearsal(
            latents=torch.stack([bank.latents[place] for bank, place in chosen]).float(),
            timesteps=torch.stack([bank.timesteps[place] for bank, place in chosen]),
            conditioning={
                key: torch.stack([bank.conditioning[key][row] for bank, row in prompt_rows])
                for key in banks[0].conditioning
            },
            target=torch.stack([bank.predictions[place] for bank, place in chosen]).float(),
            weight=self.weight * self.every,
            prompts=[bank.prompts[row] for bank, row in prompt_rows],
        )


def _choose(banks: Sequence[Bank], generator: Generator) -> tuple[Bank, int]:
    """A state of any task: all tasks alike, all states of a task alike."""
    bank = banks[int(torch.randint(len(banks), (), generator=generator))]
    return bank, int(torch.randint(len(bank.timesteps), (), generator=generator))


def prompts_of(record: TaskRecord, task_index: int, images: int, settings: float) -> list[str]:
    """A prompt for each image that is drawn of a task: what it was trained with, and the concept in
    settings of ours, which change from task to task.
    """
    known = [str(text) for text in record.facts.get("captions", ())]
    elsewhere = [text.format(concept=record.concept) for text in SETTINGS[record.kind]]
    own = known or [record.train_prompt or f"a photo of {record.concept}"]
    if "{" in own[0]:  # a style's template: what its images show is not recorded
        own = elsewhere
    others = min(images - 1, round(images * settings))
    chosen = [own[i % len(own)] for i in range(images - others)]
    first = task_index * others
    return chosen + [elsewhere[(first + i) % len(elsewhere)] for i in range(others)]
