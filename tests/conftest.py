"""Shared fixtures: a toy base on disk, small pictures, and runs in this process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from toy_runs import COLOURS, draw_pictures, write_run


def pytest_addoption(parser: pytest.Parser) -> None:
    """--run_slow: real-size checks that take minutes; --run_gpu: those that need a card."""
    parser.addoption("--run_slow", action="store_true", help="also run slow real-size checks")
    parser.addoption("--run_gpu", action="store_true", help="also run the checks on a CUDA card")


def pytest_configure(config: pytest.Config) -> None:
    """The markers of slow tests and of those on a card."""
    config.addinivalue_line("markers", "slow: real-size checks, run with --run_slow")
    config.addinivalue_line("markers", "gpu: checks on a CUDA card, run with --run_gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Slow tests and those on a card are skipped unless asked for."""
    reason = _no_card(bool(config.getoption("--run_gpu")))
    for item in items:
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not config.getoption("--run_slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --run_slow"))


def _no_card(wanted: bool) -> str:
    """Why the checks on a card cannot run; empty if they can. LCP_TEST_DEVICE=cpu tries them."""
    if not wanted:
        return "needs --run_gpu"
    device = os.environ.get("LCP_TEST_DEVICE", "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "--run_gpu: torch sees no CUDA card here"
    return ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same numbers and no fight for cores; .ci/roundings asks for more."""
    torch.set_num_threads(int(os.environ.get("LCP_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps one state per process; runs of other precisions follow in the next test."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Command lines set levels; the next test starts without them."""
    loggers = [logging.getLogger(), logging.getLogger("lcp_plugin")]
    levels = [logger.level for logger in loggers]
    handlers = list(loggers[0].handlers)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    loggers[0].handlers[:] = [h for h in loggers[0].handlers if h in handlers]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no run that several tests share, meets the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCP_CACHE", str(tmp_path_factory.getbasetemp() / "lcp_cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _disks_without_waiting() -> Iterator[None]:
    """Tests end processes, never the machine: nothing in them can tell what the platter holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _bases_read_once() -> Iterator[None]:
    """A base in a folder is read once in this process as long as none of its files changes."""
    from copy import deepcopy

    from lcp_plugin.sdxl import load

    read, known = load._read_pipeline, {}

    def read_once(path: Path, *given: Any) -> Any:
        if path.is_file():
            return read(path, *given)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        key = (*given, *((str(file), file.stat().st_mtime_ns) for file in files))
        if key not in known:
            known[key] = read(path, *given)
        return deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_read_pipeline", read_once)
        yield


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy SDXL: real classes and wiring, random weights, a step in milliseconds."""
    from lcp_plugin.sdxl.load import hush_libraries, load_pipeline
    from lcp_plugin.tiny.architecture import build_toy, save_pipeline

    hush_libraries()
    folder = tmp_path_factory.mktemp("toy") / "base"
    save_pipeline(build_toy(), folder)
    load_pipeline(str(folder))  # read once for the processes that are forked from this one, too
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four folders of small pictures: disc0 ... disc3."""
    for i, colour in enumerate(COLOURS[:4]):
        draw_pictures(tmp_path / "data" / f"disc{i}", colour=colour)
    return tmp_path / "data"


@pytest.fixture
def write_config(tmp_path: Path, toy_base: Path, pictures: Path) -> Callable[..., Path]:
    """write_config(name, tasks=(0, 1), **options) -> path of a TOML for `tasks` of `pictures`."""

    def write(name: str, tasks: Sequence[int | dict[str, Any]] = (0, 1), **options: Any) -> Path:
        return write_run(tmp_path, toy_base, pictures, name, tasks, **options)

    return write


@pytest.fixture
def train(write_config: Callable[..., Path]) -> Callable[..., Any]:
    """train(name, tasks=(0, 1), **options) -> the finished Run, in this process."""

    def run(name: str, tasks: Sequence[int | dict[str, Any]] = (0, 1), **options: Any) -> Any:
        from lcp_plugin.config.load import load_config
        from lcp_plugin.run.runner import execute

        return execute(load_config(["--config", str(write_config(name, tasks, **options))]))

    return run


@pytest.fixture
def make_base(toy_base: Path) -> Callable[..., Any]:
    """make_base(**options) -> a LiveBase on the toy base, without a run."""

    def make(**given: Any) -> Any:
        from toy_live import toy_options

        from lcp_plugin.sdxl.live_base import build_live_base
        from lcp_plugin.sdxl.load import load_pipeline
        from lcp_plugin.sdxl.precision import Precision
        from lcp_plugin.training.processes import create_accelerator

        options = toy_options(**given)
        pipeline = load_pipeline(str(toy_base), Precision.of(options).loaded)
        accelerator = create_accelerator(options.mixed_precision)
        return build_live_base(options, pipeline, accelerator.device, accelerator.autocast)

    return make
