"""tools/bench.py --device: the bars of a card. Each row is written as soon as it is measured."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import Card
from benchmarks.measure import Row, format_table

Measure = Callable[[Card], Iterator[Row]]


def measurements(text: Path | None = None) -> Mapping[str, Measure]:
    """Name -> what measures it; `text`: where the profile's tables go."""
    from benchmarks import card_chain, card_profile, card_sd_scripts, card_steps

    return {
        "step": card_steps.measure_step,
        "step_bf16_factors": card_steps.measure_bf16_factors,
        "sd_scripts": card_sd_scripts.measure_sd_scripts,
        "profile": partial(card_profile.measure_profile, text=text),
        "recall": card_chain.measure_recall,
        "boundary": card_chain.measure_boundary,
        "tenth": card_chain.measure_tenth,
    }


def list_default() -> list[str]:
    """What is measured unless some are chosen: all for which everything is at hand."""
    return [n for n in measurements() if n != "sd_scripts" or os.environ.get("SD_SCRIPTS")]


def measure_card(card: Card, chosen: Sequence[str], path: Path | None) -> tuple[list[Row], int]:
    """All rows that could be measured, and how many measurements failed.

    `path` gets a line of JSON for each row or error at once, and beside it a text with the profile.
    """
    card.use()
    known = measurements(None if path is None else path.with_suffix(".profile.txt"))
    rows, failed = [], 0
    for name in chosen:
        began = time.perf_counter()
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            for row in known[name](card):
                rows.append(row)
                _append(path, card, {"measurement": name, **row.to_json()}, began)
                print(format_table([row]), file=sys.stderr, flush=True)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}"
            _append(path, card, {"measurement": name, "error": words[:2000]}, began)
        _clean_up(card)
    return rows, failed


def _append(path: Path | None, card: Card, facts: Mapping[str, Any], began: float) -> None:
    if path is None:
        return
    spent = round(time.perf_counter() - began, 2)
    line = {**facts, "size": card.size, "card": card.describe(), "seconds_so_far": spent}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "torch": torch.__version__}) + "\n")


def _clean_up(card: Card) -> None:
    """A failed measurement leaves hooks and tensors; the next one starts without them."""
    vars(card).pop("pipeline", None)
    gc.collect()
    if card.counts_memory:
        torch.cuda.empty_cache()
