"""Prompts of up to 225 tokens, and prompts with weighted words, for both of SDXL's text encoders.

As in kohya-ss/sd-scripts (library/strategy_sdxl.py at 48d368fa): the tokens are cut into pieces of
75, each between a start and an end token; the hidden states of the pieces stand one after another
between the first start and the last end (77, 152 or 227 states); the pooled text is the first
piece's. A weight multiplies its token's hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcp_plugin.data.captions import parse_weights
from lcp_plugin.telling.wording import agree

PIECE = 75  # tokens between start and end


@dataclass(frozen=True)
class TextRules:
    """How captions and prompts become tokens; the defaults are diffusers' own."""

    max_tokens: int | None = None  # max_token_length: 75, 150 or 225; None: 75
    weighted: bool = False  # (word:1.3) weighs

    @property
    def are_plain(self) -> bool:
        """Whether diffusers' own encoding does."""
        return (self.max_tokens or 75) == 75 and not self.weighted


@dataclass(frozen=True)
class Tokens:
    """A prompt cut into pieces: ids and weights (pieces, 77)."""

    ids: Tensor
    weights: Tensor


def tokenize(tokenizer: Any, prompt: str, max_length: int, weighted: bool) -> Tokens:
    """The prompt's pieces, padded as the tokenizer pads; what exceeds max_length is cut off."""
    parts = parse_weights(prompt) if weighted else [(prompt, 1.0)]
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parts:
        part = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids += part
        weights += [weight] * len(part)
    rows, factors = [], []
    for start in range(0, max_length, PIECE):
        piece, factor = ids[:max_length][start : start + PIECE], weights[start : start + PIECE]
        # an end token closes the text; what follows is padding
        filler = PIECE - len(piece)
        pad = tokenizer.pad_token_id
        end = tokenizer.eos_token_id
        rows.append([tokenizer.bos_token_id, *piece, end, *[pad] * filler])
        factors.append([1.0, *factor[: len(piece)], *[1.0] * (filler + 1)])
    return Tokens(torch.tensor(rows), torch.tensor(factors))


def join_pieces(states: Tensor) -> Tensor:
    """Hidden states of pieces (n, pieces, 77, c) -> (n, 75 pieces + 2, c)."""
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def encode_long_prompts(
    pipeline: Any, prompts: Sequence[str], max_length: int | None, weighted: bool
) -> dict[str, Tensor]:
    """encoder_hidden_states (n, 75 pieces + 2, c1 + c2) and text_embeds (n, d), fp32.

    `max_length`: 75, 150 or 225 (None: 75). Gradients flow, for text encoders that are trained.
    """
    limit = max_length or PIECE
    joined, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        cut = [tokenize(tokenizer, prompt, limit, weighted) for prompt in prompts]
        ids = torch.cat([tokens.ids for tokens in cut]).to(encoder.device)
        result = encoder(ids, output_hidden_states=True)
        states = result.hidden_states[-2].float().unflatten(0, (len(prompts), -1))
        weights = torch.stack([tokens.weights for tokens in cut]).to(states)
        joined.append(join_pieces(states * weights[..., None]))
        pooled = result[0].float().unflatten(0, (len(prompts), -1))[:, 0]
    assert pooled is not None
    return {"encoder_hidden_states": torch.cat(joined, dim=-1), "text_embeds": pooled}


def describe_cut(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int | None,
    weighted: bool,
    what: str = "different captions",
) -> str:
    """One sentence on the texts that are cut, and which option helps; empty where none is."""
    limit = max_length or PIECE
    lengths = [_count_tokens(tokenizer, text, weighted) for text in texts]
    cut = [length for length in lengths if length > limit]
    if not cut:
        return ""
    longest = max(cut)
    enough = next((n for n in (150, 225) if longest <= n), None)
    remedy = f"max_token_length = {enough} keeps them whole"
    if enough is None:
        remedy = "225 is the most that max_token_length can keep"
        remedy += "" if limit == 225 else " (set it)"
        remedy += "; put what matters first, or shorten them"
    return f"{_tell_cut(len(cut), texts, limit, longest, what)}: {remedy}."


def _tell_cut(cut: int, texts: Sequence[str], limit: int, longest: int, what: str) -> str:
    return (
        f"{cut} of {len(texts)} {what} {agree(cut, 'is', 'are')} longer than {limit} tokens (up to "
        f"{longest}) and cut there"
    )


def _count_tokens(tokenizer: Any, text: str, weighted: bool) -> int:
    parts = parse_weights(text) if weighted else [(text, 1.0)]
    return sum(
        len(tokenizer(part, add_special_tokens=False, truncation=False, verbose=False).input_ids)
        for part, _ in parts
    )
