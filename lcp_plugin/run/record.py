"""What run.json and lineage.json say of a run: facts for people and for the same command again."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lcp_plugin import __version__
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.logs import SECRETS
from lcp_plugin.config.options import Options
from lcp_plugin.hooks import Carry
from lcp_plugin.run.network_weights import common_shape
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import MOST_CAPTIONS
from lcp_plugin.telling.wording import join_words
from lcp_plugin.training.lesson import Lesson, Trained

log = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes")


class Logbook:
    """run.json: how a run was started, what was said of it, how far it got."""

    def __init__(self, store: RunStore, facts: Mapping[str, Any], writes: bool) -> None:
        self.facts = dict(facts)
        self._store, self._writes = store, writes  # the main process alone

    def note(self, **facts: Any) -> None:
        """Facts that became known."""
        self.facts.update(facts)

    def say(self, message: str) -> None:
        """One line for the user, once."""
        if self._writes and message not in self.facts["said"]:
            self.facts["said"].append(message)
            log.warning(message)

    def write(self, status: str, observers: Mapping[str, Any] | None = None) -> None:
        """run.json. `observers`: their states; None leaves those that are known."""
        if not self._writes:
            return
        if observers is not None:
            self.note(observers=dict(observers))
        delivered = {
            "file": self._store.deliverable.name,
            "carry_hash": self._store.delivered_hash(),
        }
        self.note(status=status, deliverable=delivered)
        self._store.write_run(self.facts)


# --------------------------------------------------------------------------------- of a lesson


def note_lesson(after: Carry, lesson: Lesson, trained: Trained) -> Carry:
    """The carry with what was learned on noted in its newest record."""
    task, data = lesson.task, lesson.data
    rank, alpha = common_shape(trained.adapter)
    captions = data.captions[:MOST_CAPTIONS]
    is_one_task = len(after.tasks) == len(lesson.carry.tasks) + 1
    if captions != (task.train_prompt,) and is_one_task:
        after = after.noting(captions=list(captions))
    return after.noting(
        images=data.num_images,
        data=data.fingerprint,
        steps=trained.facts["steps"],
        rank=rank,
        alpha=alpha,
    )


# ------------------------------------------------------------------------------------ of a run


def describe_parent(parent: Parent) -> dict[str, Any]:
    """What run.json says of what a run starts from."""
    return {
        "parent": {"source": parent.source, "hash": parent.hash},
        "text_delta": text_delta_hash(parent.carry),
    }


def list_image_folders(config: RunConfig) -> dict[str, list[str]]:
    """Task name -> the folders of its training images, absolute: the references of its scores."""
    return {
        task.name: [
            str(subset.image_dir.absolute())
            for dataset in task.datasets
            for subset in dataset.subsets
            if not subset.is_reg
        ]
        for task in config.tasks
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Options that differ from their defaults, JSON-able; keys and tokens stay out."""
    plain = Options()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(options).items()
        if value != getattr(plain, key) and key not in SECRETS
    }


def describe_command(arguments: Sequence[str]) -> dict[str, str]:
    """The command line that started this process, and the folder it was given in."""
    program, words = Path(sys.argv[0] or "lcp"), ["lcp", "train"]
    is_ours = program.parent == Path(__file__).parents[1] / "commands"  # python -m ...
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's launcher sets it
        count = int(os.environ.get("WORLD_SIZE", "1"))
        several = ["--num_processes", str(count)] if count > 1 else []
        script = ["-m", "lcp_plugin.commands.train"] if is_ours else [str(program)]
        words = ["accelerate", "launch", *several, *script]
    elif program.name == "__main__.py":
        words = ["python", "-m", "lcp_plugin", "train"]
    elif program.suffix == ".py" and not is_ours:
        words = ["python", str(program)]
    words += arguments
    return {"line": join_words(words), "folder": str(Path.cwd())}


def text_delta_hash(carry: Carry) -> str:
    """Names the text encoders' delta, for caches of their outputs: "none" where there is none."""
    names = [name for name in carry.change.modules() if not name.startswith("unet.")]
    texts = Carry(carry.total.restrict(names), biases=carry.biases.restrict(names))
    return hash_carry(texts) if names else "none"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"lcp_plugin": __version__, "python": platform.python_version()}
    return found | {package: _version_of(package) for package in PACKAGES}


@cache
def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def stamp(seconds: float) -> str:
    """UTC, ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
