"""A GPU for each of the processes that train or draw at the same time.

CUDA_VISIBLE_DEVICES names the cards that may be used, here as everywhere; each process gets one of
them in a CUDA_VISIBLE_DEVICES of its own, before it touches CUDA, and gives it back at its end.
Where more work at a time than there are cards, they share them in turn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_cards() -> list[str]:
    """The cards that may be used, as CUDA_VISIBLE_DEVICES names them; empty where there are none.

    CUDA itself reads a list up to the first number that is negative.
    """
    told = os.environ.get(VARIABLE)
    if told is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    cards: list[str] = []
    for card in (part.strip() for part in told.split(",")):
        if not card or card.startswith("-"):
            break
        cards.append(card)
    return cards


def deal_cards(workers: int) -> list[str | None]:
    """The card of each of `workers` that work at the same time; None where there is no choice."""
    cards = visible_cards()
    return [cards[i % len(cards)] if len(cards) > 1 else None for i in range(workers)]


class Cards:
    """Cards that `workers` take for a while and give back."""

    def __init__(self, workers: int) -> None:
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for card in deal_cards(workers):
            self._free.put(card)

    @contextmanager
    def taken(self) -> Iterator[str | None]:
        """The card that has been free for longest; None where there is no choice."""
        card = self._free.get()
        try:
            yield card
        finally:
            self._free.put(card)


def environment_on(card: str | None) -> dict[str, str]:
    """The variable that gives a process its card."""
    return {} if card is None else {VARIABLE: card}
