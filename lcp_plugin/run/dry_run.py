"""--dry_run: the plan of a run from its config and images, no model loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.data.examples import check_images
from lcp_plugin.run.cut_texts import count_words, describe_cut_texts
from lcp_plugin.run.forecast import describe_plan, outline_plan
from lcp_plugin.sdxl.load import load_tokenizer
from lcp_plugin.sdxl.traits import is_at_hand

SDXL_NATIVE = 1024  # pixels


def describe_run(config: RunConfig, native: int = SDXL_NATIVE, processes: int = 1) -> str:
    """The plan as text, tasks in the order in which they are learned.

    `native`: the base's native size in pixels. Raises DataError for unreadable images.
    """
    read = _read_tasks(config, native)
    cut = _cut_texts(read)
    return describe_plan(
        replace(config, notices=(*config.notices, *cut)) if cut else config, read, native, processes
    )


def describe_briefly(config: RunConfig, native: int) -> str:
    """The plan without options, buckets and captions. Raises DataError for unreadable images."""
    return "\n".join(outline_plan(config, _read_tasks(config, native), native))


def _read_tasks(config: RunConfig, native: int) -> list[tuple[TaskConfig, TaskData]]:
    """The tasks in the order in which they are learned, with their images as they are trained."""
    tasks = list(config.tasks)
    if config.options.order_seed is not None:
        random.Random(config.options.order_seed).shuffle(tasks)  # as tasks.shuffle_tasks does
    check_images(dataset for task in tasks for dataset in task.datasets)
    seed = config.options.seed or 0
    return [
        (task, TaskData(task, seed, number, (native, native)))
        for number, task in enumerate(tasks, 1)
    ]


def _cut_texts(read: Sequence[tuple[TaskConfig, TaskData]]) -> tuple[str, ...]:
    """What is cut of the tasks' captions and prompts, by the base's tokenizer or by words."""
    name = read[0][0].options.pretrained_model_name_or_path if read else None
    tokenizer = load_tokenizer(name) if is_at_hand(name) else None
    told = [
        text
        for task, data in read
        for text in describe_cut_texts(
            tokenizer or count_words, task.name, task.options, data.captions, task.eval_prompts
        )
    ]
    how = "" if tokenizer else " (Counted by words: the base's tokenizer is not on this machine.)"
    return tuple(f"{text}{how}" for text in dict.fromkeys(told))
