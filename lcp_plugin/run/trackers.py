"""Who watches a run: the built-in observers, accelerate's trackers, and the user's own."""

from __future__ import annotations

import importlib

from lcp_plugin.config.logs import TrackerSettings, tracker_settings
from lcp_plugin.errors import DiskError
from lcp_plugin.hooks import Observer
from lcp_plugin.observers import Console, JsonLines, Trackers
from lcp_plugin.registry import create
from lcp_plugin.run.context import Context


def create_observers(run: Context) -> tuple[Observer, ...]:
    """Built-in observers, then the user's in the order given; main process only.

    Each goes on from the state that run.json has of it.
    """
    if not run.is_main:
        return ()
    observers: list[Observer] = [Console(), JsonLines()]
    if start_trackers(run):
        observers.append(Trackers(run.accelerator))
    observers += [create(Observer, name) for name in run.options.observer]
    for key, state in run.facts.get("observers", {}).items():
        index = int(key.split(":")[0])
        if index < len(observers):
            observers[index].load_state_dict(state)
    return tuple(observers)


def usable_trackers(settings: TrackerSettings | None) -> list[str]:
    """Those of the trackers asked for whose packages are installed."""
    if settings is None:
        return []
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    return [name for name in settings.names if name in installed]


def start_trackers(run: Context) -> bool:
    """Starts what log_with asks for; whether anything is there to log to."""
    settings = tracker_settings(run.options)
    if settings is None:
        return False
    usable = usable_trackers(settings)
    if not usable:
        packages = " or ".join(settings.names)
        asked = run.options.log_with
        run.logbook.say(f"log_with = {asked}: nothing is logged; pip install {packages}.")
        return False
    if settings.wandb_api_key and "wandb" in usable:
        importlib.import_module("wandb").login(key=settings.wandb_api_key)
    try:
        if settings.folder is not None:
            settings.folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.init_trackers(
            settings.project, config=dict(settings.config) or None, init_kwargs=dict(settings.start)
        )
    except OSError as error:
        raise DiskError(
            f"log_with: {' and '.join(usable)} cannot write to {settings.folder or 'its folder'} "
            f"({error.strerror or error}); free some space or choose another logging_dir."
        ) from error
    return bool(run.accelerator.trackers)
