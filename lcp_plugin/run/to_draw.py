"""How many images a run will draw: what it tells of its time left stands on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.config.options import Options
from lcp_plugin.evaluation.scores import count_cells
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import TaskRecord


def count_images(
    options: Options, own: Sequence[TaskRecord], parent: Parent | None
) -> dict[str, int]:
    """`samples` behind the last task, and all that the `scores` at the end are made of: every task
    at every state of the model, the base's too. Earlier tasks of a chain count among the scores
    where their run is still at hand.
    """
    earlier = parent.carry.tasks if parent else ()
    source = Path(parent.source) if parent and parent.source else None
    scored = len(own) + (len(earlier) if source is not None and source.is_dir() else 0)
    prompts = max((len(record.prompts) for record in own), default=0)
    prompts = min(prompts, options.evaluate_prompts or prompts)
    cells = count_cells(options.strategy, scored) + scored if options.evaluate else 0
    return {
        "samples": options.samples_per_task * (len(earlier) + len(own)),
        "scores": cells * prompts * options.evaluate_images,
    }
