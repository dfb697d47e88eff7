"""A GPU for each of the runs that are trained at the same time.

CUDA_VISIBLE_DEVICES names the cards that may be used, here as everywhere; each run gets one of them
in a CUDA_VISIBLE_DEVICES of its own, before its process touches CUDA, and gives it back at its end.
Where more runs work at a time than there are cards, they share them in turn.
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


class Cards:
    """Cards that runs take for a while and give back."""

    def __init__(self, runs_at_a_time: int) -> None:
        cards = visible_cards()
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for number in range(runs_at_a_time):
            self._free.put(cards[number % len(cards)] if len(cards) > 1 else None)

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
