"""What a run's texts lose where they are longer than the text encoders take, told before training.

Captions, prompts of samples and those of evaluation become max_token_length tokens. Without the
base's tokenizer words and signs are counted, each of which is a token at least.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcp_plugin.config.options import Options
from lcp_plugin.config.prompts import read_prompts
from lcp_plugin.sdxl.long_prompts import describe_cut

_WORD = re.compile(r"[^\W\d_]+|\d|(?:[^\s\w]|_)+")  # where CLIP's tokenizer splits a text at least


@dataclass(frozen=True)
class _Words:
    input_ids: Sequence[str]


def count_words(text: str, **_: Any) -> _Words:
    """Stands in for a tokenizer that is not at hand; its counts are never too large."""
    return _Words(_WORD.findall(text))


def describe_cut_texts(
    tokenizer: Any, name: str, options: Options, captions: Sequence[str], prompts: Sequence[str]
) -> tuple[str, ...]:
    """A sentence on each kind of texts of a task that are cut. `prompts`: of its evaluation."""
    limit, weighted = options.max_token_length, options.weighted_captions
    samples = read_prompts(options.sample_prompts) if options.sample_prompts else ()
    asked = list(dict.fromkeys(p.prompt for p in samples))
    told = (
        (f"task {name}", describe_cut(tokenizer, captions, limit, weighted)),
        (f"task {name}", describe_cut(tokenizer, prompts, limit, weighted, "evaluation prompts")),
        ("sample_prompts", describe_cut(tokenizer, asked, limit, weighted, "prompts")),
    )
    return tuple(f"{where}: {text}" for where, text in told if text)
