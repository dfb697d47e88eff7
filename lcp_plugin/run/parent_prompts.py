"""What a LoRA of another tool was trained on, in words: what a rehearsing strategy asks it for.

Given by --prev_prompts, else what its header says: the trigger phrase, the classes of its folders
(`5_sks dog`), the tags that most of its captions have. Our own chains record their prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.header_prompts import prompts_of_metadata
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.hooks import Strategy
from lcp_plugin.store.task_folder import Parent

log = logging.getLogger(__name__)


def check_no_prompts(given: Sequence[str]) -> None:
    """Raises ConfigError for prompts where a run starts from nothing."""
    if given:
        raise ConfigError(
            "prev_prompts tells what the LoRA that prev names was trained with, and prev is not "
            "given; add prev or leave it out."
        )


def note_prompts(parent: Parent, given: Sequence[str], strategy: Strategy) -> Parent:
    """The parent with prompts for what another tool taught it, if the strategy rehearses.

    Raises:
        ConfigError: prompts for a chain that records its own, or nothing to go by.
    """
    rehearses = type(strategy).rehearse is not Strategy.rehearse
    if not parent.foreign:
        if given:
            raise ConfigError(
                f"prev_prompts: {parent.source} is no LoRA of another tool; leave them out: our "
                "own chains record the prompts of their tasks."
            )
        return parent
    if not (given or rehearses):
        return parent
    prompts = tuple(given) or _prompts_of_header(parent)
    if not prompts:
        raise ConfigError(
            f"strategy {strategy.name} rehearses what {parent.source} knows, and its header does "
            "not say what that is; name prompts that it was trained with: "
            '--prev_prompts "a photo of ...", or take a strategy that rehearses nothing: '
            "--strategy merge_init."
        )
    if rehearses and not given:
        log.warning("%s is rehearsed by what its header says: %s.", parent.source, _quote(prompts))
    tasks = tuple(
        replace(record, facts={**record.facts, "captions": list(prompts)})
        for record in parent.carry.tasks
    )
    return replace(parent, carry=replace(parent.carry, tasks=tasks))


def _prompts_of_header(parent: Parent) -> tuple[str, ...]:
    path = Path(str(parent.source))
    return prompts_of_metadata(read_header(path).metadata) if path.is_file() else ()


def _quote(prompts: Sequence[str]) -> str:
    return ", ".join(f"'{prompt}'" for prompt in prompts)
