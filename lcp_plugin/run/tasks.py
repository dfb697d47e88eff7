"""A run's tasks as strategies see them: numbered along the chain, in order, or joined into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.hooks import Strategy
from lcp_plugin.run.chaining import check_name
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import Task, fill_prompt, shuffle_tasks


def order_tasks(
    config: RunConfig, parent: Parent, strategy: Strategy
) -> tuple[tuple[Task, ...], dict[str, TaskConfig]]:
    """The run's tasks, numbered along the chain; one task for a strategy that joins them."""
    learned = max((r.index for r in parent.carry.tasks), default=0)
    for task in config.tasks:
        check_name(task.name, parent)
    tasks = tuple(make_task(learned + 1 + i, c) for i, c in enumerate(config.tasks))
    configs = {c.name: c for c in config.tasks}
    tasks = shuffle_tasks(tasks, config.options.order_seed)
    if strategy.joins_tasks and len(tasks) > 1:
        joint, joint_config = join_tasks(tasks, config)
        return (joint,), {joint.name: joint_config}
    return tasks, configs


def make_task(index: int, config: TaskConfig) -> Task:
    """The value that strategies see."""
    return Task(
        index=index,
        name=config.name,
        kind=config.kind,
        concept=config.concept,
        prompts=config.eval_prompts,
        train_prompt=fill_prompt(config.train_prompt, config.concept, "{class_name}"),
        images=tuple(str(s.image_dir) for d in config.datasets for s in d.subsets),
        overrides=dict(config.overrides),
    )


def join_tasks(tasks: Sequence[Task], config: RunConfig) -> tuple[Task, TaskConfig]:
    """One task with everyone's images and the sum of their steps."""
    parts = {c.name: c for c in config.tasks}
    steps = sum(parts[t.name].options.max_train_steps for t in tasks)
    task = Task(
        index=tasks[-1].index,
        name="joint",
        kind=tasks[0].kind,
        concept="joint",
        prompts=(),
        parts=tuple(tasks),
    )
    first = config.tasks[0]
    return task, TaskConfig(
        name="joint",
        kind=first.kind,
        concept="joint",
        train_prompt="",
        eval_prompts=(),
        datasets=tuple(d for c in config.tasks for d in c.datasets),
        options=replace(config.options, max_train_steps=steps),
        has_tables=any(c.has_tables for c in config.tasks),
    )
