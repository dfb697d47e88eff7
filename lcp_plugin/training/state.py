"""The state of a task in training: factors, optimizer, scaler, strategy, observers.

safetensors and JSON, never a pickle. Beside the run's own state (store.RunStore) a state can stand
in a folder of its own (save_state), from which another run goes on (resume).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError, ResumeError
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.tensors import read_tensors, write_tensors
from lcp_plugin.training.optimizer_state import flatten_state, unflatten_state

if TYPE_CHECKING:
    from lcp_plugin.training.loop import TaskRun

log = logging.getLogger(__name__)

Parts = dict[str, dict[str, Tensor]]
State = tuple[int, Parts, dict[str, Any]]  # step, tensors by part, facts
MANIFEST = "state.json"


def collect_state(run: TaskRun) -> tuple[Parts, dict[str, Any]]:
    """Everything that the next step depends on."""
    factors = {
        f"{name}.{part}": tensor.detach().cpu().clone()
        for name, pair in run.trainer.adapted.pair_of.items()
        for part, tensor in (("A", pair.down), ("B", pair.up))
    }
    optimizer_tensors, optimizer_rest = flatten_state(run.optimizer.state_dict())
    scaler = run.accelerator.scaler
    parts = {"factors": factors, "optimizer": optimizer_tensors}
    strategy = run.strategy.state_dict()
    if strategy:
        parts["strategy"] = strategy
    facts = {
        "optimizer": optimizer_rest,
        "optimizer_name": run.optimizer_name,
        "scaler": None if scaler is None else scaler.state_dict(),
        "data": run.data.fingerprint,
        "start": run.start_hash,
        "validation": run.validation,
        "observers": run.observer_state(),
    }
    return parts, facts


def apply_state(run: TaskRun, state: State) -> None:
    """Puts a state into a prepared task.

    Raises:
        ResumeError: it was made from other images, with another optimizer or on another start.
    """
    step, parts, facts = state
    _check_fits(run, step, parts, facts)
    run.step, run.validation = step, [list(row) for row in facts.get("validation", [])]
    with torch.no_grad():
        for name, pair in run.trainer.adapted.pair_of.items():
            pair.down.copy_(parts["factors"][f"{name}.A"])
            pair.up.copy_(parts["factors"][f"{name}.B"])
    run.optimizer.load_state_dict(unflatten_state(parts["optimizer"], facts["optimizer"]))
    if facts["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(facts["scaler"])
    if "strategy" in parts:
        run.strategy.load_state_dict(parts["strategy"])
    log.info("task %s goes on at step %d of %d.", run.task.name, run.step, run.total)


def _check_fits(run: TaskRun, step: int, parts: Parts, facts: Mapping[str, Any]) -> None:
    name = run.task.name
    if facts["data"] != run.data.fingerprint:
        raise ResumeError(
            f"the images or captions of task {name} have changed since it was "
            "interrupted; restore them, or delete its state/ folder to start the task again."
        )
    if facts["optimizer_name"] != run.optimizer_name:
        raise ResumeError(
            f"task {name} was interrupted with {facts['optimizer_name']}, now there is "
            f"{run.optimizer_name}; install the same, or delete its state/ folder."
        )
    wanted = {f"{n}.A": tuple(p.down.shape) for n, p in run.trainer.adapted.pair_of.items()}
    found = {k: tuple(t.shape) for k, t in parts["factors"].items() if k.endswith(".A")}
    starts = {facts.get("start"), run.start_hash} - {"", None}  # unset: nobody asked for states
    if len(starts) > 1 or wanted != found:
        raise ResumeError(
            f"the state was made from another start of task {name} (base, earlier tasks, rank or "
            "modules differ); resume it with the settings that it was made with."
        )
    if step > run.total:
        raise ResumeError(
            f"the state of task {name} is at step {step}, beyond the {run.total} steps of this "
            "run; raise max_train_steps."
        )


def write_state(folder: Path, run: TaskRun) -> None:
    """A state in a folder of its own; state.json last."""
    parts, facts = collect_state(run)
    for name, tensors in parts.items():
        write_tensors(folder / f"{name}.safetensors", tensors, None)
    hashes = {name: file_model_hash(folder / f"{name}.safetensors") for name in parts}
    manifest = {
        "task_index": run.task.index,
        "task": run.task.name,
        "step": run.step,
        "hashes": hashes,
        "facts": facts,
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """state.json. Raises FileFormatError."""
    manifest = dict(read_json(folder / MANIFEST))
    if not {"task_index", "step", "hashes", "facts"} <= set(manifest):
        raise FileFormatError(f"{folder / MANIFEST} is no state of this tool; name another folder.")
    return manifest


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
