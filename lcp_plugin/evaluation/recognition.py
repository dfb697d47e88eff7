"""Is it still the learned concept? Its images against the references of all concepts of the chain.

An image is nearest to the concept that holds the reference with the largest cosine to it, among
references as the model itself could show them (`evaluation.mirrors`). A concept is recognised in a
state of the model when most of its images, more than half, are nearest to its own references. One
that is not became the concept that most of its images are nearest to; where no concept has most of
them, it blurs into the other one that has the most of them.

    share        of a concept's images that are nearest to its own references
    covered      (R[i, i] - base) / (ceiling - base): how far of the way learning came, where the
                 ceiling is the score of the references as the VAE returns them

Numbers and words only: `lcp evaluate` measures, scores.json carries, report and sample grid tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcp_plugin.telling.wording import agree, join_names

MOST = 0.5  # more than this share is most
RULE = (
    "A concept counts as recognised when most of its images, more than half, are nearest to its "
    "own reference pictures, as the VAE returns them, and not to another concept's"
)


@dataclass(frozen=True)
class Look:
    """What a task's images look like in one state of the model."""

    share: float  # nearest to the task's own references
    other: str | None = None  # of the other tasks, the one that most images are nearest to
    other_share: float = 0.0

    @property
    def is_recognised(self) -> bool:
        """By the rule that `RULE` says in words."""
        return self.share > MOST


@dataclass(frozen=True)
class Recognition:
    """The looks of a chain's tasks: in each state since it was learned, and under the base."""

    metric: str  # whose encoder looked
    images: int  # of a task in a state
    tasks: tuple[str, ...]
    looks: tuple[tuple[Look | None, ...], ...]  # [task][state]; None before it was learned
    base: tuple[Look, ...]

    @property
    def final(self) -> dict[str, Look]:
        """Each task under the last model."""
        last = ((name, row[-1]) for name, row in zip(self.tasks, self.looks, strict=True))
        return {name: look for name, look in last if look is not None}

    @property
    def kept(self) -> tuple[str, ...]:
        """The tasks that are recognised at the end."""
        return tuple(name for name, look in self.final.items() if look.is_recognised)

    @property
    def lost(self) -> dict[str, Look]:
        """Those that are not."""
        return {name: look for name, look in self.final.items() if not look.is_recognised}

    def was_recognised(self, task: str) -> bool:
        """In any state since it was learned."""
        row = self.looks[self.tasks.index(task)]
        return any(look is not None and look.is_recognised for look in row)

    def to_json(self) -> dict[str, Any]:
        """What scores.json holds; its last two entries are read off the others."""
        return {
            "metric": self.metric,
            "images": self.images,
            "looks": [[look and asdict(look) for look in row] for row in self.looks],
            "base": [asdict(look) for look in self.base],
            "recognised": list(self.kept),
            "turned_into": {name: look.other for name, look in self.lost.items()},
        }


def read_recognition(entry: Mapping[str, Any]) -> Recognition | None:
    """Of a run's entry in scores.json; None where nothing was recognised or mistaken: a single
    concept, or scores from before this was measured.
    """
    found = entry.get("recognition")
    if not found:
        return None
    return Recognition(
        metric=str(found["metric"]),
        images=int(found["images"]),
        tasks=tuple(str(name) for name in entry["tasks"]),
        looks=tuple(tuple(x and Look(**x) for x in row) for row in found["looks"]),
        base=tuple(Look(**look) for look in found["base"]),
    )


def tell_recognised(found: Recognition) -> str:
    """One line for the console: `still recognised: 2 of 4; robot and vase became boat`."""
    count = f"still recognised: {len(found.kept)} of {len(found.tasks)}"
    return "; ".join([count, *tell_losses(found)])


def tell_losses(found: Recognition, names: Mapping[str, str] | None = None) -> list[str]:
    """`robot and vase became boat`: what the tasks that are not recognised at the end look like.

    Tasks of one fate share a phrase; `names` calls them otherwise (their concepts).
    """
    called = {name: name for name in found.tasks} | dict(names or {})
    fates: dict[tuple[str, str], list[str]] = {}
    for name, look in found.lost.items():
        other = called[look.other] if look.other else "nothing that was learned"
        fates.setdefault((_verb_of(found, name, look), other), []).append(called[name])
    return [_tell_fate(verb, other, lost) for (verb, other), lost in fates.items()]


def _verb_of(found: Recognition, task: str, look: Look) -> str:
    if not found.was_recognised(task):
        return "never"
    return "became" if look.other_share > MOST else "blurs"


def _tell_fate(verb: str, other: str, lost: Sequence[str]) -> str:
    who, count = join_names(lost), len(lost)
    if verb == "never":
        looks = agree(count, "it looks", "they look")
        return f"{who} never {agree(count, 'was', 'were')} recognised, {looks} like {other}"
    if verb == "blurs":
        verb = agree(count, "blurs into", "blur into")
    return f"{who} {verb} {other}"


def judge(images: ArrayLike, references: Mapping[str, ArrayLike], own: str) -> Look:
    """The look of images (n, d) among the references (m, d) of all tasks, rows L2-normalised.

    A tie with another task's reference goes to the other.
    """
    rows = np.asarray(images, dtype=np.float64)
    order = [*(name for name in references if name != own), own]  # argmax takes the first of equals
    nearest = np.stack([_nearest(rows, references[name]) for name in order])
    counts = np.bincount(nearest.argmax(axis=0), minlength=len(order))
    shares = counts / len(rows)
    if len(order) == 1 or not counts[:-1].any():
        return Look(float(shares[-1]))
    means = nearest.mean(axis=1)
    other = max(range(len(order) - 1), key=lambda at: (counts[at], means[at]))
    return Look(float(shares[-1]), order[other], float(shares[other]))


def share_of_ceiling(
    learned: ArrayLike, base: ArrayLike, ceiling: ArrayLike
) -> NDArray[np.float64]:
    """(learned - base) / (ceiling - base) of every task   # (tasks,), NaN unless ceiling > base."""
    low, high = np.asarray(base, dtype=np.float64), np.asarray(ceiling, dtype=np.float64)
    way = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.asarray(learned, dtype=np.float64) - low) / way
    return np.asarray(np.where(way > 0, share, np.nan), dtype=np.float64)


def _nearest(rows: NDArray[np.float64], references: ArrayLike) -> NDArray[np.float64]:
    """Every row's largest cosine with a reference   # (n,)."""
    return np.asarray((rows @ np.asarray(references, dtype=np.float64).T).max(axis=1))
