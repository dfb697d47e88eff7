"""Processes that begin with the libraries loaded: forked from a server that has imported them."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

_PRELOADED = "lcp_plugin.evaluation.preloaded"


def library_server(*also: str) -> Any:
    """multiprocessing's context of such processes, which begin with the modules `also` too; None
    where the system has none (Windows), or where libraries that are loaded may not be forked: those
    of macOS start threads, and a fork then crashes (why Python spawns there).
    """
    if sys.platform == "darwin" or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED, *also])
    return context
