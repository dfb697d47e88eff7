"""What a run finds under its name: nothing, itself to go on with, or something to make room for.

A run that was started with other settings is refused where it holds work, naming --overwrite; what
has learned nothing (a mistyped option, a rate whose first step gave NaN) starts over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any

from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ResumeError
from lcp_plugin.formats.shapes import check_shape
from lcp_plugin.run.network_weights import check_start
from lcp_plugin.sdxl.load import BaseId
from lcp_plugin.store.lock import LOCK, locked
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.shapes import ADVICE, RESUMED_SHAPE
from lcp_plugin.store.task_folder import Parent

log = logging.getLogger(__name__)


def take_up(
    store: RunStore, config: RunConfig, base: BaseId
) -> tuple[dict[str, Any], Parent] | None:
    """run.json and parent of the run that goes on; None for one that begins, its place cleared.

    Raises:
        ResumeError: something that was learned would be lost, or the settings differ.
        DiskError: another process is at work there.
    """
    known = store.read_run()
    if known is None:
        _check_nothing_is_lost(store, config.options)
        return None
    check_shape(known, RESUMED_SHAPE, store.root / "run.json", ADVICE)
    if config.options.overwrite and known["status"] == "finished":
        clear_run(store)
        return None
    try:
        check_unchanged(known, config, base)
        parent = store.read_parent()
        check_start(config.options, parent, is_new=parent.source is None)
        return known, parent
    except ResumeError:
        if store.holds_work() and not config.options.overwrite:
            raise
    log.warning("run '%s' starts over with the settings as they are now.", store.name)
    clear_run(store)
    return None


def check_taken(store: RunStore, config: RunConfig, base: BaseId) -> None:
    """Raises ResumeError where `take_up` would, and changes nothing."""
    if config.options.overwrite:
        return
    known = store.read_run()
    if known is None:
        _check_nothing_is_lost(store, config.options)
    elif store.holds_work():
        check_shape(known, RESUMED_SHAPE, store.root / "run.json", ADVICE)
        check_unchanged(known, config, base)


def clear_run(store: RunStore) -> None:
    """Removes a run's folder, but for its lock, and its deliverable.

    Raises:
        DiskError: another process is at work in it.
    """
    with locked(store.root, store.name):
        for path in store.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        store.deliverable.unlink(missing_ok=True)


def _check_nothing_is_lost(store: RunStore, options: Options) -> None:
    """A new run must not write over files that are there."""
    for path in (store.deliverable, *store.root.glob("*/lineage.json")):
        if path.exists() and not options.overwrite:
            raise ResumeError(
                f"{path} exists already; choose another --output_name, or --overwrite it."
            )
        if path.exists():
            clear_run(store)
            return


def check_unchanged(known: Mapping[str, Any], config: RunConfig, base: BaseId) -> None:
    """A run is resumed with the settings it was started with; tasks may be appended.

    Raises:
        ResumeError: naming the keys that differ.
    """
    old, new = dict(known["fingerprint"]), config.fingerprint()
    old_tasks, new_tasks = old.pop("tasks"), list(new["tasks"])
    new = {k: v for k, v in new.items() if k != "tasks"}
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    if known["base"]["hash"] != base.hash:
        changed.append("the base's weights")
    if new_tasks[: len(old_tasks)] != old_tasks:
        changed.append("tasks (only appending is possible)")
    elif len(new_tasks) != len(old_tasks) and config.options.order_seed is not None:
        changed.append("tasks (order_seed would shuffle the learned ones anew)")
    if changed:
        details = ", ".join(
            f"{k} (was {old[k]!r}, is {new[k]!r})" if k in old and k in new else k for k in changed
        )
        raise ResumeError(
            f"run '{known['name']}' was started with other settings: {details}. Restore them, "
            "choose another --output_name, or start over with --overwrite: what it has learned "
            "is lost then."
        )
