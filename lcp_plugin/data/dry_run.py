"""--dry_run: the plan of a run from its config and images, no model loaded."""

from __future__ import annotations

import random

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.plan import describe_plan
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.data.examples import check_images

SDXL_NATIVE = 1024  # pixels


def describe_run(config: RunConfig, native: int = SDXL_NATIVE, processes: int = 1) -> str:
    """The plan as text, tasks in the order in which they are learned.

    `native`: the base's native size in pixels. Raises DataError for unreadable images.
    """
    tasks = list(config.tasks)
    if config.options.order_seed is not None:
        random.Random(config.options.order_seed).shuffle(tasks)  # as tasks.shuffle_tasks does
    check_images(dataset for task in tasks for dataset in task.datasets)
    seed = config.options.seed or 0
    read = [
        (task, TaskData(task, seed, number, (native, native)))
        for number, task in enumerate(tasks, 1)
    ]
    return describe_plan(config, read, native, processes)
