"""The images of many chains, drawn by several processes before the scoring reads them.

Each state of a model is drawn by one process, in the batches that the scoring itself would draw, so
the images are the same. Nothing depends on a process getting to its end: what it leaves undrawn, or
cannot draw, the scoring makes, and tells what is wrong with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from lcp_plugin.errors import LcpError
from lcp_plugin.evaluation.cards import deal_cards, environment_on
from lcp_plugin.evaluation.chains import Chain
from lcp_plugin.evaluation.evaluate import Evaluation
from lcp_plugin.evaluation.pictures import Picture, Stage
from lcp_plugin.evaluation.processes import library_server
from lcp_plugin.telling.wording import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One state of the model, and the images that it makes."""

    chain: Chain
    stage: Stage
    pictures: tuple[Picture, ...]  # made or not: the batches are of all of them
    missing: int


def draw_ahead(evaluation: Evaluation, chains: Sequence[Chain], processes: int) -> int:
    """Draws what `chains` lack, with `processes` at a time; how many images were missing.

    Nothing happens for one process, or where only one state of a model is to be drawn.
    """
    if processes < 2:
        return 0
    work = list_work(evaluation, chains)
    shares = [share for share in deal(work, processes) if share]
    if len(shares) < 2:
        return 0
    images = sum(item.missing for item in work)
    told = (counted(images, "image"), counted(len(shares), "process"))
    logger.info("%s to make, in %s", *told)
    alone = replace(evaluation, studios={}, caches={})
    threads = max(1, (os.cpu_count() or 1) // len(shares))
    context = _context()
    drawing: list[BaseProcess] = []
    try:
        for share, card in zip(shares, deal_cards(len(shares)), strict=True):
            try:
                drawing.append(_start(context, (alone, share), threads, card))
            except OSError as error:
                logger.warning("a process to make images cannot be started: %s.", error)
        for process in drawing:
            process.join()
    finally:
        for process in drawing:
            if process.is_alive():
                process.terminate()
                process.join()
    _tell_dead(drawing)
    return images


def _start(context: Any, work: object, threads: int, card: str | None) -> BaseProcess:
    """A process that draws `work`, which it is sent once it runs.

    Among what a process is started with, much work fills the pipe; where the process dies before it
    reads that, multiprocessing waits forever (spawn on Linux and macOS keep the other end open).
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    data = bytes(ForkingPickler.dumps(work))
    process: BaseProcess = context.Process(
        target=_draw_share, args=(receiver, threads, card), daemon=True
    )
    with receiver:
        process.start()
    threading.Thread(target=_send, args=(sender, data), daemon=True).start()
    return process


def _send(sender: Connection, data: bytes) -> None:
    """In a thread: Windows may hold the other end of a process that died."""
    with suppress(OSError), sender:  # that is told by its exit code
        sender.send_bytes(data)


def _tell_dead(drawing: Sequence[BaseProcess]) -> None:
    """A warning for processes that ended by something else than their end."""
    codes = [str(process.exitcode) for process in drawing if process.exitcode]
    if codes:
        logger.warning(
            "%d of %s that make images died (exit code %s); what they left is made now.",
            *(len(codes), counted(len(drawing), "process"), ", ".join(codes)),
        )


def list_work(evaluation: Evaluation, chains: Sequence[Chain]) -> list[Work]:
    """One item per state of a model that lacks images; a state that several chains share belongs
    to the first of them, as it does when one process draws."""
    seen: set[tuple[str, str]] = set()
    found = []
    for chain in chains:
        studio = evaluation.studio(chain.base)
        for stage, pictures in evaluation.by_stage(chain, chain.drawn_cells()).items():
            if (chain.base_hash, stage.weights) in seen:
                continue
            seen.add((chain.base_hash, stage.weights))
            missing = len(studio.missing(stage, pictures))
            if missing:
                found.append(Work(chain, stage, tuple(pictures), missing))
    return found


def deal(work: Sequence[Work], shares: int) -> list[list[Work]]:
    """Items to shares of about as many images each, the largest first; a share keeps the order of
    the chains, whose boundaries are walked from the oldest."""
    dealt: list[list[int]] = [[] for _ in range(max(1, shares))]
    for at in sorted(range(len(work)), key=lambda at: -work[at].missing):
        min(dealt, key=lambda share: sum(work[i].missing for i in share)).append(at)
    return [[work[at] for at in sorted(share)] for share in dealt]


def _context() -> Any:
    return library_server() or multiprocessing.get_context("spawn")


def _draw_share(receiver: Connection, threads: int, card: str | None) -> None:
    """In a process of its own; ends at once where the one that started it has."""
    os.environ.update(environment_on(card))
    import torch

    from lcp_plugin.sdxl.load import hush_libraries

    hush_libraries()
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    try:
        with receiver:
            evaluation, share = receiver.recv()
        for item in share:
            if parent is not None and not parent.is_alive():
                return
            evaluation.studio(item.chain.base).make(item.stage, item.pictures)
    except EOFError:
        return  # the one that started it has ended
    except (LcpError, KeyboardInterrupt):
        return  # the scoring meets it, and tells
