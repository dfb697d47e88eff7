"""Strategies x orders x seeds: runs planned, started, resumed, and compared in one table.

A lane is one (order, seed): the same tasks in the same order from the same seed. Its first run
leads; the others take over the leader's first task, because a first task is trained alike under
every strategy that starts it alike (checked on a small specification), so only its carry is formed
anew. `merge_at_end` takes over all tasks of `independent`. Every run is the ordinary command in a
process of its own, so it resumes as that does; the libraries are loaded once for all of them.
Finished runs are left alone.
"""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.adapter import AdapterSpec
from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.errors import ConfigError, LcpError
from lcp_plugin.evaluation.processes import library_server
from lcp_plugin.formats.disk import write_json
from lcp_plugin.hooks import Carry, TaskStart
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.replay import task_of
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import TaskFolder
from lcp_plugin.tasks import Task

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
FOUR = ("naive", "merge_init", "merge_ortho_init", "magmax")
_COMMAND = "lcp_plugin.cli"
PRELOADED = ("lcp_plugin.run.runner", "lcp_plugin.run.after")  # what each run imports first
_FORKING = threading.Lock()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    strategy: str
    order_seed: int | None
    seed: int
    output_dir: str
    name: str
    arguments: tuple[str, ...]  # of the training command
    leader: str = ""  # name of the run whose first tasks are taken over
    shared: int = 1  # tasks to take over

    @property
    def store(self) -> RunStore:
        """Where it is written."""
        return RunStore(Path(self.output_dir), self.name)

    @property
    def is_finished(self) -> bool:
        """Whether run.json says so."""
        facts = self.store.read_run()
        return facts is not None and facts.get("status") == "finished"


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep in waves: within a wave, none waits for another."""

    waves: tuple[tuple[PlannedRun, ...], ...]

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All of them, in the order of strategies within lanes."""
        return tuple(run for wave in self.waves for run in wave)


def plan_runs(
    config: Path,
    strategies: Sequence[str],
    ceilings: Sequence[str],
    orders: Sequence[int | None],
    seeds: Sequence[int],
    output: Path,
    extra: Sequence[str] = (),
) -> Plan:
    """Every strategy and ceiling in every lane; leaders first, then those that follow them.

    Raises:
        ConfigError: nothing to run, or a strategy twice.
    """
    names = [*strategies, *ceilings]
    if not strategies or len(set(names)) != len(names) or not orders or not seeds:
        raise ConfigError("a sweep needs strategies, each once, and at least one order and seed.")
    waves: tuple[list[PlannedRun], ...] = ([], [], [])
    for order in orders:
        for seed in seeds:
            lane = f"{'' if order is None else f'_order{order}'}_seed{seed}"
            for strategy in names:
                follows, shared = _leader_of(strategy, names)
                run = PlannedRun(
                    strategy,
                    order,
                    seed,
                    output.as_posix(),
                    f"{strategy}{lane}",
                    _arguments(config, strategy, order, seed, output, f"{strategy}{lane}", extra),
                    leader=f"{follows}{lane}" if follows else "",
                    shared=shared,
                )
                waves[_wave(strategy, follows, names)].append(run)
    return Plan(tuple(tuple(wave) for wave in waves if wave))


def _leader_of(strategy: str, names: Sequence[str]) -> tuple[str, int]:
    """Whose tasks a strategy takes over, and how many."""
    if strategy == "merge_at_end" and "independent" in names:
        return "independent", sys.maxsize
    if strategy in (names[0], "joint"):
        return "", 0
    return names[0], 1


def _wave(strategy: str, follows: str, names: Sequence[str]) -> int:
    if not follows:
        return 0
    return 2 if strategy == "merge_at_end" and follows != names[0] else 1


def _arguments(
    config: Path,
    strategy: str,
    order: int | None,
    seed: int,
    output: Path,
    name: str,
    extra: Sequence[str],
) -> tuple[str, ...]:
    arguments = ["--config", str(config), "--strategy", strategy, "--seed", str(seed)]
    arguments += [] if order is None else ["--order_seed", str(order)]
    arguments += ["--output_dir", output.as_posix(), "--output_name", name]
    arguments += ["--evaluate"]  # nothing: the sweep scores all runs together
    return (*arguments, *extra)


# ------------------------------------------------------------------------------ one run


def execute_planned(run: PlannedRun, threads: int | None = None) -> str:
    """Trains one run to its end (on `threads` CPU threads, if told); its name. Nothing happens to a
    finished one.

    Raises:
        LcpError: the run failed; the message ends with the last lines of its log.
    """
    if run.is_finished:
        return run.name
    if run.leader and run.store.read_run() is None:
        adopt_tasks(RunStore(Path(run.output_dir), run.leader), run.arguments, run.shared)
    log = Path(run.output_dir) / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    status = train(run.arguments, log, threads)
    if status:
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-4:]
        raise LcpError(f"run {run.name} failed ({status}), see {log}: " + " | ".join(tail))
    return run.name


def train(arguments: Sequence[str], log: Path, threads: int | None = None) -> int:
    """The training command in a process of its own, forked from one that has its libraries loaded
    where the system can; its exit status. What it prints is added to `log`.
    """
    context = library_server(*PRELOADED)
    if context is None:
        return _start_anew(arguments, log, threads)
    with _FORKING, _environment(threads):  # the server takes its environment from the first start
        process = context.Process(
            target=_become_training, args=(tuple(arguments), str(log), threads)
        )
        process.start()
    process.join()
    return int(process.exitcode or 0)


def _become_training(arguments: Sequence[str], log: str, threads: int | None) -> None:
    """`python -m lcp_plugin.cli ...` in this process, its output in `log`."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = [_COMMAND, *arguments]
    runpy.run_module(_COMMAND, run_name="__main__")


def _start_anew(arguments: Sequence[str], log: Path, threads: int | None) -> int:
    with log.open("ab") as out, _environment(threads) as environment:
        command = [sys.executable, "-m", _COMMAND, *arguments]
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
        )
    return done.returncode


@contextmanager
def _environment(threads: int | None) -> Iterator[dict[str, str]]:
    """The variables of a run's process: this package is found, and `threads` are used."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    wanted |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield dict(os.environ)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def adopt_tasks(source: RunStore, arguments: Sequence[str], count: int = 1) -> int:
    """Begins a run with another's first tasks: the trained adapters as they are, the carries as the
    new run's strategy forms them. Returns how many were taken over; 0 where the strategies would
    have begun the first task differently.
    """
    config = load_config(list(arguments))
    options = config.options
    known, folders = source.read_run(), source.folders()[:count]
    if known is None or not folders or not _begin_alike(folders[0], config):
        return 0
    strategy = create_strategy(options.strategy, options.strategy_args)
    target = RunStore(Path(str(options.output_dir)), str(options.output_name))
    carry, before = Carry(), None
    for folder in folders:
        task, trained = task_of(folder, carry), folder.read_adapter()
        carry = strategy.end_task(task, carry, trained).noting(**folder.records[-1].facts)
        facts = _adopted_facts(folder, config, before)
        saved = target.save_task(task, trained, carry, strategy, facts, options.keep_carries)
        before = saved.lineage["hashes"]["carry"]
    _adopt_samples(source, target, folders[:1])
    write_json(target.root / "run.json", _adopted_run(known, config, target))
    return len(folders)


def _adopted_facts(folder: TaskFolder, config: RunConfig, before: str | None) -> dict[str, Any]:
    """The leader's lineage but for what is the run's own."""
    own = {"format", "task", "tasks", "hashes"}
    facts = {key: value for key, value in folder.lineage.items() if key not in own}
    options = config.options
    return facts | {
        "strategy": {"name": options.strategy, "args": list(options.strategy_args)},
        "parent": {"hash": before, "source": folder.lineage["parent"]["source"]},
        "adopted_from": folder.path.as_posix(),
    }


def _adopted_run(known: Mapping[str, Any], config: RunConfig, target: RunStore) -> dict[str, Any]:
    """A run.json that the training command resumes from."""
    keys = ("format", "base", "seed", "tasks", "images", "sessions", "base_sampled")
    kept = {key: known[key] for key in keys if key in known}
    return kept | {
        "name": target.name,
        "fingerprint": config.fingerprint(),
        "status": "running",
        "ended": [],
        "said": [],
    }


def _adopt_samples(source: RunStore, target: RunStore, folders: Sequence[TaskFolder]) -> None:
    """The base's samples and those behind the first task: the same model drew them."""
    for stage in ("00_base", *(folder.path.name for folder in folders)):
        images = source.root / "samples" / stage
        if images.is_dir():
            shutil.copytree(images, target.root / "samples" / stage, dirs_exist_ok=True)


def _begin_alike(folder: TaskFolder, config: RunConfig) -> bool:
    """Whether both strategies start a first task from the same factors on an untouched base."""
    theirs, ours = folder.lineage["strategy"], config.options
    spec = AdapterSpec({"unet.probe": (4, 6)}, rank=2, alpha=2.0, seed=1)
    task = Task(1, "probe", "object", "probe", ())
    starts = []
    for name, arguments in (
        (theirs["name"], theirs["args"]),
        (ours.strategy, ours.strategy_args),
    ):
        strategy = create_strategy(name, arguments)
        starts.append(strategy.begin_task(task, Carry(), spec))
    return _equal_starts(*starts)


def _equal_starts(a: TaskStart, b: TaskStart) -> bool:
    if a.base or b.base or a.trainable != b.trainable or a.adapter.keys() != b.adapter.keys():
        return False
    return all(
        torch.equal(a.adapter[n].down, b.adapter[n].down)
        and torch.equal(a.adapter[n].up, b.adapter[n].up)
        for n in a.adapter
    )


# ------------------------------------------------------------------------------ all runs


def execute_plan(plan: Plan, executor: Any = None, parallel: int = 1) -> None:
    """All runs, wave by wave: here, `parallel` at a time, or as jobs of a submitit executor.

    Raises:
        LcpError: a run failed; the others of its wave are finished first.
    """
    for wave in plan.waves:
        waiting = [run for run in wave if not run.is_finished]
        if executor is None:
            _execute_here(waiting, parallel)
            continue
        jobs = [executor.submit(execute_planned, run) for run in waiting]
        errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise LcpError(f"{len(errors)} of {len(jobs)} runs failed; the first: {errors[0]}")


def _execute_here(runs: Sequence[PlannedRun], parallel: int) -> None:
    """A few processes at a time that share the cores; the first failure is told at the end."""
    threads = max(1, (os.cpu_count() or 1) // parallel)

    def execute(run: PlannedRun) -> None:
        logger.info("%s ...", run.name)
        execute_planned(run, threads if parallel > 1 else None)

    with ThreadPoolExecutor(max_workers=parallel) as pool:
        errors = [e for f in [pool.submit(execute, run) for run in runs] if (e := f.exception())]
    if errors:
        raise errors[0]


def create_executor(kind: str, folder: Path, parameters: Sequence[str]) -> Any:
    """None for "here"; a submitit executor for "local" processes or a "slurm" cluster.

    Args:
        parameters: key=value for the executor, e.g. timeout_min=120 slurm_partition=gpu.
    Raises:
        ConfigError: submitit is missing, or a parameter is not key=value.
    """
    if kind == "here":
        return None
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            f"--executor {kind} needs submitit: pip install 'lcp_plugin[slurm]'."
        ) from None
    executor = submitit.AutoExecutor(folder=folder, cluster=kind)
    values: dict[str, Any] = {"timeout_min": 24 * 60}
    for pair in parameters:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--job {pair}: wanted key=value, as submitit names them.")
        values[key] = int(value) if value.isdigit() else value
    executor.update_parameters(**values)
    return executor
