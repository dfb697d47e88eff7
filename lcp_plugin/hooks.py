"""What crosses a task boundary, and the two kinds of plugin that stand there.

A `Strategy` (exactly one per run) decides what the next task starts from and what crosses; any
number of `Observer`s only look. Everything that crosses is a value: frozen, CPU, fp32, with no
model in sight.

    for task in tasks:
        start = strategy.begin_task(task, carry, spec)
        ... train start.adapter on W0 + start.base ...
        carry = strategy.end_task(task, carry, trained)

The model after a boundary is W0 + carry.total.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from torch import Generator, Tensor, nn

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.biases import Biases, Change
from lcp_plugin.delta import Delta
from lcp_plugin.tasks import Task, TaskRecord

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
Weights = Literal["trained", "start", "carry", "base"]
Parameters = Mapping[str, tuple[nn.Parameter, nn.Parameter]]  # module -> (A, B), on the device
Conditioning = Mapping[str, Tensor]  # encoder_hidden_states, text_embeds, time_ids


@dataclass(frozen=True)
class Carry:
    """The one thing that crosses a boundary. `adapter` is only for factors that go on training."""

    delta: Delta = field(default_factory=Delta)
    adapter: Adapter | None = None
    tasks: tuple[TaskRecord, ...] = ()
    biases: Biases = field(default_factory=Biases)  # of a parent; the run keeps them, no strategy

    @property
    def total(self) -> Delta:
        """delta + Delta.of(adapter): the model after the boundary is W0 + total."""
        return self.delta + Delta.of(self.adapter) if self.adapter else self.delta

    @property
    def change(self) -> Change:
        """The total and the biases: all that the model after the boundary adds to W0."""
        return Change(self.total, self.biases)

    def after(self, task: Task, delta: Delta, adapter: Adapter | None = None) -> Carry:
        """The carry behind `task`: a new delta, an adapter if its factors go on, its records."""
        return Carry(delta, adapter, (*self.tasks, *task.records()), self.biases)

    def noting(self, **facts: Any) -> Carry:
        """The same carry with facts added to the newest record (strings and numbers only)."""
        *earlier, newest = self.tasks
        noted = replace(newest, facts={**newest.facts, **facts})
        return replace(self, tasks=(*earlier, noted))


@dataclass(frozen=True)
class TaskStart:
    """Where a task's training starts."""

    base: Delta  # frozen during the task
    adapter: Adapter
    trainable: frozenset[str] = frozenset({"A", "B"})  # or a part of it


@dataclass(frozen=True)
class Trajectory:
    """What a model went through while it drew images: every state, its time, what it predicted."""

    latents: Tensor  # (n, 4, h, w), noisy
    timesteps: Tensor  # (n,), int64
    predictions: Tensor  # (n, 4, h, w), with the conditioning, before any guidance


@dataclass(frozen=True)
class Rehearsal:
    """Examples that a step trains beside its own: weight * mean (prediction - target)^2.

    The loop gives them a forward and a backward pass of their own, in pieces no larger than the
    task's batch, so they need no more memory than the step itself.
    """

    latents: Tensor  # (n, 4, h, w), noisy
    timesteps: Tensor  # (n,)
    conditioning: Conditioning  # n rows
    target: Tensor  # (n, 4, h, w)
    weight: float = 1.0
    prompts: Sequence[str] = ()  # n; encoded anew, with gradients, where text encoders train


class Model(Protocol):
    """The live model as before_training and after_training see it."""

    task: Task  # the one in training
    learned: tuple[TaskRecord, ...]  # what the carried model knows

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        weights: Weights = "trained",
    ) -> Tensor:
        """The UNet's output (batch, 4, h, w) under the named weights."""

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents at the timesteps (b,), and the target that the base's type asks for."""

    def sample(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """One image per prompt from the model as it is being trained."""

    def encode_prompts(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> Conditioning:
        """Conditioning of prompts at a latent size (h, w); None: the base's own resolution."""

    def generator(self, purpose: str) -> Generator:
        """Random numbers for a strategy's own draws, derived from (seed, task, purpose); CPU."""

    def progress(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with a bar on the console and the time left."""

    def sizes(self) -> Sequence[tuple[int, int]]:
        """The latent sizes (h, w) of this task's examples, the most frequent first."""

    def draw(
        self,
        prompts: str | Sequence[str],
        noise: Tensor,
        steps: int,
        guidance: float,
        generator: Generator,
        weights: Weights = "carry",
    ) -> Trajectory:
        """Draws an image from each noise (n, 4, h, w) in latent space, by one prompt or n of them,
        and keeps every state: the rows of a step together, steps in their order.
        """

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, kept on disk with the state of the task: a resumed run reads it
        instead of making it again, all processes get that of the first, and it is gone when the
        task is complete.
        """

    def batches(self) -> Iterator[Mapping[str, Tensor]]:
        """This task's examples once: latents, conditioning."""

    @property
    def parameters(self) -> Parameters:
        """module -> (A, B) on the device."""

    @property
    def scales(self) -> Mapping[str, float]:
        """module -> alpha / rank."""


class Step(Protocol):
    """One training step as the step hooks see it."""

    index: int  # optimizer step within the task, from 0
    total: int  # optimizer steps of the task
    batch: Mapping[str, Tensor]  # latents, noise, noisy_latents, conditioning, loss_weights
    prediction: Tensor  # (batch, 4, h, w)
    target: Tensor  # (batch, 4, h, w)
    timesteps: Tensor  # (batch,)
    generator: Generator  # CPU, derived from (seed, task, step): for a strategy's own draws

    @property
    def parameters(self) -> Parameters:
        """module -> (A, B) on the device."""

    @property
    def scales(self) -> Mapping[str, float]:
        """module -> alpha / rank."""

    def base_delta(self, name: str) -> Tensor | None:
        """The frozen base delta of a module on the device, (out, in); None where it is zero."""

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        weights: Weights = "trained",
    ) -> Tensor:
        """What the UNet of `weights` predicts (`Model.predict`); gradients for "trained" only."""


class Strategy(ABC):
    """Decides what crosses a boundary.

    Subclasses annotate the arguments of `__init__`, which become --strategy_args.
    """

    name: str = ""
    starts_from_parent: bool = True  # False: step 0 does not predict what W0 + carry.total predicts
    joins_tasks: bool = False  # True: the runner joins all tasks of a run into one (the ceiling)

    @abstractmethod
    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        """What the task starts from. Pure: repeated on resume; changes none of its inputs."""

    def before_training(self, model: Model) -> None:
        """The model stands as the task starts; prepare what the step hooks need."""

    def rehearse(self, step: Step) -> Rehearsal | None:
        """Examples of earlier tasks for this step, or None.

        Asked once for each optimizer step, before its first forward pass: `batch` is as loaded,
        prediction and target are empty. Whether there are any depends on step.index alone, so that
        all processes agree.
        """

    def before_backward(self, step: Step, loss: Tensor) -> Tensor:
        """The loss to minimise, per micro-batch, before accumulation and loss scaling."""
        return loss

    def before_optimizer_step(self, step: Step) -> None:
        """Edit gradients: after unscaling, before clipping, when gradients are synchronised."""

    def after_optimizer_step(self, step: Step) -> None:
        """Edit the factors in place (projections), under no_grad."""

    def after_training(self, model: Model) -> None:
        """Fisher information, prototypes, replay, while the model is still there."""

    @abstractmethod
    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        """What crosses the boundary. Changes no input; may update the strategy's own state."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the strategy needs later beside the carry; saved with it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave, when a run or chain goes on with the same strategy."""


STEP_HOOKS = (  # what a training loop calls; begin_task and end_task need none
    "before_training",
    "rehearse",
    "before_backward",
    "before_optimizer_step",
    "after_optimizer_step",
    "after_training",
)


def step_hooks_of(strategy: Strategy) -> list[str]:
    """The hooks that a strategy has in the training of a task, in the order of their calls."""
    own = type(strategy)
    return [hook for hook in STEP_HOOKS if getattr(own, hook) is not getattr(Strategy, hook)]


class RunView(Protocol):
    """A run as observers see it."""

    output_dir: Any  # pathlib.Path of the run's folder
    name: str
    tasks: Sequence[Task]
    strategy: Strategy
    seed: int
    device: str
    facts: Mapping[str, Any]  # options and versions, JSON-able


@dataclass(frozen=True)
class StepReport:
    """What an observer learns of a finished optimizer step."""

    task: Task
    index: int  # optimizer step within the task, from 1
    total: int
    loss: float  # mean over the micro-batches, before a strategy's penalty
    objective: float  # as minimised, a strategy's penalty and rehearsal included
    lr: float
    seconds: float  # wall clock of this step
    peak_memory_mb: float  # of the device, or of the process on CPU
    rehearsal: float | None = None  # mean squared error on what is rehearsed; None without any


class Observer:
    """Only looks: every hook does nothing and must return None; runs on the main process only."""

    name: str = ""

    def on_run_begin(self, run: RunView) -> None:
        """Before the first task, also when a run is resumed."""

    def on_task_begin(self, run: RunView, task: Task) -> None:
        """Before a task's training, also when it is resumed within."""

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """After each optimizer step."""

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """The mean loss on the task's held-out images after `step` optimizer steps (0: before)."""

    def on_sample(
        self, run: RunView, task: Task | None, images: Mapping[str, Sequence[Image]]
    ) -> None:
        """Samples after `task` (None: of the base): task name -> images."""

    def on_task_end(self, run: RunView, task: Task, carry: Carry) -> None:
        """The task is complete on disk."""

    def on_run_end(self, run: RunView) -> None:
        """All tasks are done and delivered."""

    def on_exception(self, run: RunView, error: BaseException) -> None:
        """The run is about to stop with this error."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state, saved with the run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, when the run is resumed."""
