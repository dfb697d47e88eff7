"""The state of a task in training: factors, optimizer, scaler, strategy, observers.

safetensors and JSON, never a pickle. Beside the run's own state (store.RunStore) a state can stand
in a folder of its own (save_state), from which another run goes on (resume).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError, Page, ResumeError, explaining
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.shapes import check_shape
from lcp_plugin.formats.tensors import read_tensors, write_tensors
from lcp_plugin.store.shapes import STATE_SHAPE
from lcp_plugin.telling.wording import agree, counted
from lcp_plugin.training.learner import Learner
from lcp_plugin.training.optimizer_state import flatten_state, unflatten_state
from lcp_plugin.training.processes import share_state

log = logging.getLogger(__name__)

Parts = dict[str, dict[str, Tensor]]
State = tuple[int, Parts, dict[str, Any]]  # step, tensors by part, facts
MANIFEST = "state.json"


def collect_state(learner: Learner, observers: Mapping[str, Any]) -> tuple[Parts, dict[str, Any]]:
    """Everything that the next step depends on. `observers`: their states."""
    updates, scaler = learner.updates, learner.room.accelerator.scaler
    factors = {
        f"{name}.{part}": tensor.detach().cpu().clone()
        for name, pair in learner.model.adapted.pair_of.items()
        for part, tensor in (("A", pair.down), ("B", pair.up))
    }
    optimizer_tensors, optimizer_rest = flatten_state(updates.optimizer.state_dict())
    parts = {"factors": factors, "optimizer": optimizer_tensors}
    strategy = learner.room.strategy.state_dict()
    if strategy:
        parts["strategy"] = strategy
    facts = {
        "optimizer": optimizer_rest,
        "optimizer_name": updates.optimizer_name,
        "scaler": None if scaler is None else scaler.state_dict(),
        "data": learner.lesson.data.fingerprint,
        "start": learner.start_hash,
        "validation": learner.validation,
        "observers": dict(observers),
    }
    return parts, facts


def save_state(learner: Learner, observers: Mapping[str, Any]) -> None:
    """The run's own state of the task, so that the next step can be the same after a kill."""
    parts, facts = collect_state(learner, observers)
    learner.room.store.save_state(learner.lesson.task, learner.step, parts, facts)


def resume(learner: Learner) -> None:
    """Goes on from the newest state of the task, where there is one.

    With --overwrite a state of the run's own that does not fit any more makes room.

    Raises:
        ResumeError: it was made from other images, with another optimizer or on another start.
    """
    task, store, options = learner.lesson.task, learner.room.store, learner.lesson.options
    accelerator = learner.room.accelerator
    found: State | None = share_state(
        accelerator,
        lambda: newest_state(lambda: store.read_state(task), options.resume, task.index),
    )
    if found is None:
        return
    try:
        _check_fits(learner, *found)
    except ResumeError:
        if options.resume or not options.overwrite:
            raise
        log.warning("task %s starts again: its state does not fit any more.", task.name)
        if accelerator.is_main_process:
            store.clear_state()
        return
    apply_state(learner, found)


def apply_state(learner: Learner, state: State) -> None:
    """Puts a state into a lesson whose optimizer is ready. Raises ResumeError as `resume`."""
    step, parts, facts = state
    _check_fits(learner, step, parts, facts)
    with torch.no_grad():
        for name, pair in learner.model.adapted.pair_of.items():
            pair.down.copy_(parts["factors"][f"{name}.A"])
            pair.up.copy_(parts["factors"][f"{name}.B"])
    optimizer, scaler = learner.updates.optimizer, learner.room.accelerator.scaler
    optimizer.load_state_dict(unflatten_state(parts["optimizer"], facts["optimizer"]))
    if facts["scaler"] is not None and scaler is not None:
        scaler.load_state_dict(facts["scaler"])
    if "strategy" in parts:
        learner.room.strategy.load_state_dict(parts["strategy"])
    learner.go_on_from(step, [list(row) for row in facts.get("validation", [])])
    name = learner.lesson.task.name
    log.info("task %s goes on at step %d of %d.", name, step, learner.total)


def _check_fits(learner: Learner, step: int, parts: Parts, facts: Mapping[str, Any]) -> None:
    name, pairs = learner.lesson.task.name, learner.model.adapted.pair_of
    if facts["data"] != learner.lesson.data.fingerprint:
        raise ResumeError(
            f"the images or captions of task {name} have changed since it was interrupted; "
            f"restore them, or {_way_out(learner, step)}."
        )
    if facts["optimizer_name"] != learner.updates.optimizer_name:
        raise ResumeError(
            f"task {name} was interrupted with {facts['optimizer_name']}, now there is "
            f"{learner.updates.optimizer_name}; install the same, or {_way_out(learner, step)}."
        )
    wanted = {f"{n}.A": tuple(p.down.shape) for n, p in pairs.items()}
    found = {k: tuple(t.shape) for k, t in parts["factors"].items() if k.endswith(".A")}
    starts = {facts.get("start"), learner.start_hash} - {"", None}  # unset: nobody asked for states
    if len(starts) > 1 or wanted != found:
        raise ResumeError(
            f"the state was made from another start of task {name} (base, earlier tasks, rank or "
            "modules differ); resume it with the settings that it was made with."
        )
    if step > learner.total:
        raise ResumeError(
            f"the state of task {name} is at step {step}, beyond the "
            f"{counted(learner.total, 'step')} of this run; raise max_train_steps."
        )


def _way_out(learner: Learner, step: int) -> str:
    """What starts the task again, and what is lost then."""
    if learner.lesson.options.resume:
        return "leave out --resume"
    return (
        f"start this task again with --overwrite: its {counted(step, 'step')} "
        f"{agree(step, 'is', 'are')} lost then, the tasks before it stay"
    )


def write_state(folder: Path, learner: Learner, observers: Mapping[str, Any]) -> None:
    """A state in a folder of its own; state.json last."""
    parts, facts = collect_state(learner, observers)
    for name, tensors in parts.items():
        write_tensors(folder / f"{name}.safetensors", tensors, None)
    hashes = {name: file_model_hash(folder / f"{name}.safetensors") for name in parts}
    manifest = {
        "task_index": learner.lesson.task.index,
        "task": learner.lesson.task.name,
        "step": learner.step,
        "hashes": hashes,
        "facts": facts,
    }
    write_json(folder / MANIFEST, manifest, indent=None)


@explaining(Page.RESUMING, FileFormatError)
def read_manifest(folder: Path) -> dict[str, Any]:
    """state.json. Raises FileFormatError."""
    advice, file = "it is no state of this tool; name another folder.", folder / MANIFEST
    return dict(check_shape(read_json(file), STATE_SHAPE, file, advice))


@explaining(Page.RESUMING, FileFormatError)
def read_state_folder(folder: Path) -> State:
    """A state as `write_state` left it. Raises FileFormatError for a damaged one."""
    manifest = read_manifest(folder)
    parts: Parts = {}
    for name, expected in manifest["hashes"].items():
        path = folder / f"{name}.safetensors"
        if file_model_hash(path) != expected:
            raise FileFormatError(f"{path} is damaged (hash differs); resume from another state.")
        parts[name] = {k: t.clone() for k, t in read_tensors(path).items()}
    return int(manifest["step"]), parts, dict(manifest["facts"])


def newest_state(
    read_own: Callable[[], State | None], resume: str | None, task_index: int
) -> State | None:
    """The run's own state of the task, or the one that --resume names if that is further."""
    own = read_own()
    if resume is None or int(read_manifest(Path(resume))["task_index"]) != task_index:
        return own
    given = read_state_folder(Path(resume))
    return given if own is None or given[0] > own[0] else own
