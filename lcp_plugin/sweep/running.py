"""The runs of a sweep: started, resumed, waited for, here or as jobs of a cluster.

Every run is the ordinary command in a process of its own, so it resumes as that does; the libraries
are loaded once for all of them. Finished runs are left alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.errors import ConfigError, LcpError
from lcp_plugin.evaluation.cards import Cards, environment_on
from lcp_plugin.evaluation.processes import library_server
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.sweep.adoption import adopt_tasks
from lcp_plugin.sweep.plan import PlannedRun, SweepPlan
from lcp_plugin.telling.wording import counted

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
_COMMAND = "lcp_plugin.cli"
PRELOADED = ("lcp_plugin.run.runner", "lcp_plugin.run.follow_up")  # what each run imports first
_FORKING = threading.Lock()
_STOPPING = threading.Event()  # by Ctrl-C: runs save their state and end, no other begins
LOOK = 0.5  # seconds between two looks at it


# ------------------------------------------------------------------------------ one run


def execute_planned(run: PlannedRun, threads: int | None = None, card: str | None = None) -> str:
    """Trains one run to its end, unless it is there (on `threads` CPU threads and a card, if told);
    its name.

    Raises:
        LcpError: the run failed; the message ends with the last lines of its log.
    """
    if run.is_finished:
        return run.name
    if run.leader and run.store.read_run() is None:
        adopt_tasks(RunStore(Path(run.output_dir), run.leader), run.arguments, run.shared)
    log = Path(run.output_dir) / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    status = train(run.arguments, log, threads, card)
    if status:
        tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-4:]
        raise LcpError(f"run {run.name} failed ({status}), see {log}: " + " | ".join(tail))
    return run.name


def train(
    arguments: Sequence[str], log: Path, threads: int | None = None, card: str | None = None
) -> int:
    """The training command in a process of its own, forked from one that has its libraries loaded
    where the system can; its exit status. What it prints is added to `log`.
    """
    context = library_server(*PRELOADED)
    if context is None:
        return _start_anew(arguments, log, threads, card)
    with (
        _FORKING,
        _environment(threads, card),
    ):  # the server takes its environment from the first start
        process = context.Process(
            target=_become_training, args=(tuple(arguments), str(log), threads, card)
        )
        process.start()
    while process.is_alive():
        process.join(LOOK)
        if _STOPPING.is_set():
            process.terminate()
    return int(process.exitcode or 0)


def _become_training(
    arguments: Sequence[str], log: str, threads: int | None, card: str | None
) -> None:
    """`python -m lcp_plugin.cli ...` in this process, its output in `log`."""
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    os.environ.update(environment_on(card))
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.argv = [_COMMAND, *arguments]
    runpy.run_module(_COMMAND, run_name="__main__")


def _stop_with_the_sweep() -> None:
    """Waits for the end of the process that started this one, and has the run save its state and
    stop: left alone, it would hold its folder against the sweep that is started again.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _start_anew(arguments: Sequence[str], log: Path, threads: int | None, card: str | None) -> int:
    with _FORKING, _environment(threads, card) as environment:
        pass  # set for a moment only: runs start at the same time
    with log.open("ab") as out:
        command = [sys.executable, "-m", _COMMAND, *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if _STOPPING.wait(LOOK):
                process.terminate()
                process.wait()
    return process.returncode


@contextmanager
def _environment(threads: int | None, card: str | None) -> Iterator[dict[str, str]]:
    """The variables of a run's process: this package is found, `threads` and the card are used."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    wanted |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    wanted |= environment_on(card)
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


# ------------------------------------------------------------------------------ all runs


def execute_plan(plan: SweepPlan, executor: Any = None, parallel: int = 1) -> None:
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
            raise LcpError(
                f"{len(errors)} of {counted(len(jobs), 'run')} failed; the first: {errors[0]}"
            )


def _execute_here(runs: Sequence[PlannedRun], parallel: int) -> None:
    """A few processes at a time that share the cores and the cards; the first failure is told at
    the end.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)
    cards = Cards(parallel)

    def execute(run: PlannedRun) -> None:
        with cards.taken() as card:
            if _STOPPING.is_set():
                return
            logger.info("%s ...%s", run.name, "" if card is None else f" on card {card}")
            execute_planned(run, threads if parallel > 1 else None, card)

    with ThreadPoolExecutor(max_workers=parallel) as pool:
        try:
            waiting = [pool.submit(execute, run) for run in runs]
            errors = [error for future in waiting if (error := future.exception())]
        except KeyboardInterrupt:
            _STOPPING.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            _STOPPING.clear()
    if errors:
        raise errors[0]


def create_executor(kind: str, folder: Path, parameters: Sequence[str]) -> Any:
    """None for "here"; a submitit executor for "local" processes or a "slurm" cluster.

    Args:
        parameters: key=value for the executor, e.g. timeout_min=120 slurm_partition=gpu; a job on
        Slurm asks for one GPU unless gpus_per_node says otherwise.
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
    values |= {"gpus_per_node": 1} if kind == "slurm" else {}
    for pair in parameters:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--job {pair}: wanted key=value, as submitit names them.")
        values[key] = int(value) if value.isdigit() else value
    executor.update_parameters(**values)
    return executor
