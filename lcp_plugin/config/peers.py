"""Configurations of trainers that are not read here: named, with the page that translates them.

OneTrainer   JSON with base_model_name, training_method, concept_file_name; concepts in a list apart
ai-toolkit   YAML (or JSON) with job and, under config, a list process
SimpleTuner  JSON with model_family and data_backend_config, with or without "--" before each key;
             data sets in a list apart, multidatabackend.json
(Nerogar/OneTrainer, training_presets; ostris/ai-toolkit, config/examples; bghira/SimpleTuner,
documentation/OPTIONS.md and DATALOADER.md)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.errors import ConfigError, Page, explaining


@dataclass(frozen=True)
class Peer:
    """A trainer, and groups of keys of which any is found in its files alone."""

    name: str
    page: Page
    tables: tuple[frozenset[str], ...] = ()  # at the top of a file
    items: tuple[frozenset[str], ...] = ()  # in each entry of a list

    def wrote(self, keys: Collection[str], signs: tuple[frozenset[str], ...]) -> bool:
        """Whether these keys are its own."""
        return any(sign <= set(keys) for sign in signs)


ONETRAINER = Peer(
    "OneTrainer",
    Page.ONETRAINER,
    tables=(
        frozenset({"training_method", "base_model_name"}),
        frozenset({"concept_file_name"}),
        frozenset({"__version", "model_type"}),
    ),
    items=(frozenset({"path", "image", "text"}), frozenset({"path", "include_subdirectories"})),
)
AI_TOOLKIT = Peer("ai-toolkit", Page.AI_TOOLKIT, tables=(frozenset({"job", "config"}),))
SIMPLETUNER = Peer(
    "SimpleTuner",
    Page.SIMPLETUNER,
    tables=(frozenset({"data_backend_config"}), frozenset({"model_family", "model_type"})),
    items=(frozenset({"id", "type"}), frozenset({"id", "dataset_type"})),
)
PEERS = (ONETRAINER, AI_TOOLKIT, SIMPLETUNER)


def stop_at_peers(value: Any, path: str | Path) -> None:
    """Raises ConfigError for what another trainer's file holds, named with the page on it."""
    if isinstance(value, Mapping):
        keys = [str(key).removeprefix("--") for key in value]
        found = next((peer for peer in PEERS if peer.wrote(keys, peer.tables)), None)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        found = next((peer for peer in PEERS if peer.wrote(value[0], peer.items)), None)
    else:
        return
    if found is not None:
        _stop(found, path)


def stop_at_yaml(text: str, path: str | Path) -> None:
    """Raises ConfigError for a YAML text, with the trainer's name where its keys tell it."""
    keys = re.findall(r"^([\w-]+):", text, re.MULTILINE)
    if AI_TOOLKIT.wrote(keys, AI_TOOLKIT.tables):
        _stop(AI_TOOLKIT, path)
    raise ConfigError(
        f"{path}: is YAML; wanted TOML as kohya's trainer has it: key = value, [section]."
    )


def _stop(peer: Peer, path: str | Path) -> None:
    with explaining(peer.page):
        raise ConfigError(
            f"{path}: is a configuration of {peer.name}, which is not read here; translate it by "
            f"the table in {peer.page.partition('#')[0]}, or let `lcp init PHOTOS` write one."
        )
