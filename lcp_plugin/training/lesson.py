"""What training takes, as values: the lesson of one task, and what all lessons of a run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.formats.lora_file import LoraFile
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task
from lcp_plugin.training.modules import make_spec
from lcp_plugin.training.processes import Processes

if TYPE_CHECKING:
    from PIL.Image import Image


def draw_nothing(prompts: Sequence[str], seed: int) -> list[Image]:
    """In the place of samples, where nobody looks at any."""
    return []


@dataclass(frozen=True)
class Lesson:
    """One task as it is about to be learned."""

    task: Task
    options: Options  # of this task
    data: TaskData
    start: TaskStart
    carry: Carry  # what came across the boundary
    held_out: TaskData | None = None  # the images that validation measures
    began: float = 0.0  # seconds since the epoch


@dataclass(frozen=True)
class Classroom:
    """What every lesson of a run takes place in."""

    base: LiveBase
    accelerator: Processes
    strategy: Strategy
    store: RunStore
    seed: int
    weights: LoraFile | None = None  # network_weights, whose ranks dim_from_weights takes
    draw: Callable[[Sequence[str], int], list[Image]] = draw_nothing  # prompts, seed
    stop_requested: Callable[[], bool] = lambda: False

    def spec(self, task: Task, options: Options) -> AdapterSpec:
        """What a fresh adapter of the task looks like."""
        return make_spec(self.base.adapted, options, task, self.seed, self.weights)


@dataclass(frozen=True)
class Trained:
    """What a lesson gives."""

    adapter: Adapter
    facts: dict[str, Any] = field(default_factory=dict)
