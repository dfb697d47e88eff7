"""How many tokens of a prompt an image is drawn from, and which prompts are cut there.

A run's images are drawn from as many tokens as it was trained with (max_token_length, 75 without
it), as are those of LoRA files by the config that --tasks names; --max_token_length overrules both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from lcp_plugin.errors import BaseModelError
from lcp_plugin.evaluation.chains import Chain
from lcp_plugin.sdxl.load import find_tokenizer
from lcp_plugin.sdxl.long_prompts import describe_cut

logger = logging.getLogger(__name__)


def limit_tokens(chains: Sequence[Chain], max_tokens: int | None) -> list[Chain]:
    """The chains with prompts of so many tokens; None leaves each its own."""
    if max_tokens is None:
        return list(chains)
    return [
        replace(
            chain,
            base=replace(chain.base, texts=replace(chain.base.texts, max_tokens=max_tokens)),
        )
        for chain in chains
    ]


def warn_of_cut_prompts(chains: Sequence[Chain]) -> None:
    """A line on each chain whose prompts are longer, where the base's tokenizer is at hand."""
    for chain in chains:
        try:
            tokenizer = find_tokenizer(chain.base.model)
        except BaseModelError:  # it may be gone, and every image there
            continue
        prompts = list(dict.fromkeys(p for task in chain.tasks for p in task.prompts))
        rules = chain.base.texts
        if tokenizer is not None and (
            told := describe_cut(
                tokenizer, prompts, rules.max_tokens, rules.weighted, "evaluation prompts"
            )
        ):
            logger.warning("%s: %s", chain.name, told)
