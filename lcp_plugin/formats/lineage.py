"""What a file knows of its making: tasks, strategy, base, parents by hash (`ss_lcp_*` keys).

A header is text to text. These keys are ours and stand in no other module; other readers ignore
them, and `header` words those that others read. Parents are named by `sshs_model_hash`, which
depends on tensors only, so that they can be verified even if their metadata was edited. Everything
read is data: no path is followed, nothing is run, and what cannot be understood is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcp_plugin.errors import LineageError, Page, explaining
from lcp_plugin.tasks import TaskRecord

OWN_PREFIX = "ss_lcp_"  # what the keys of a lineage start with
HEADER_FORMAT = "1"
UNTRAINED = ("merge", "export")  # before a colon or alone: a tool made the file, no strategy
UNKNOWN_HASHES = ("", "None", "NOFILE", "IsADirectory")  # what sd-scripts says of no single file


@dataclass(frozen=True)
class ParentFile:
    """A file that another one was made from."""

    name: str
    hash: str  # sshs_model_hash, or the hash of a carry's tensors
    weight: float | None = None  # in a merge

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {"name": self.name, "hash": self.hash, "weight": self.weight}


@dataclass(frozen=True)
class Lineage:
    """The `ss_lcp_*` part of a header. Empty fields were not recorded."""

    tasks: tuple[TaskRecord, ...] = ()  # oldest first, those of parents included
    strategy: str = ""  # of the last task; "merge:METHOD" or "export" for what was not trained
    strategy_args: tuple[str, ...] = ()  # key=value
    base: str = ""
    base_hash: str = ""
    carry: str = ""  # adapter: its factors go on training; delta: they rest
    carry_hash: str = ""
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # ranks stacked; * = others
    parents: tuple[ParentFile, ...] = ()  # a chain has one at most, a merge several
    seeds: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # as a config holds them

    def to_metadata(self) -> dict[str, str]:
        """Header entries; what is empty is left out."""
        values = {
            "format": HEADER_FORMAT,
            "tasks": _dump([t.to_json() for t in self.tasks]),
            "strategy": self.strategy,
            "strategy_args": _dump(list(self.strategy_args)),
            "base": self.base,
            "base_hash": self.base_hash,
            "carry": self.carry,
            "carry_hash": self.carry_hash,
            "blocks": _dump({n: list(b) for n, b in self.blocks.items()}),
            "parents": _dump([p.to_json() for p in self.parents]),
            "seeds": _dump(dict(self.seeds)),
            "versions": _dump(dict(self.versions)),
            "options": _dump(dict(self.options)),
        }
        return {OWN_PREFIX + name: value for name, value in values.items() if value}

    @classmethod
    @explaining(Page.LINEAGE, LineageError)
    def from_metadata(cls, metadata: Mapping[str, str]) -> Lineage | None:
        """What a header says; None if it has no `ss_lcp_*` keys.

        Raises:
            LineageError: our keys are there, but damaged or of a newer version.
        """
        if not is_ours(metadata):
            return None
        found = _text(metadata, "format")
        if found != HEADER_FORMAT:
            raise LineageError(
                f"the lineage is of format {found[:20]}, this version reads {HEADER_FORMAT}; "
                "update lcp_plugin."
            )
        try:
            return cls(
                tasks=tuple(TaskRecord.from_json(t) for t in _load(metadata, "tasks", [])),
                strategy=_text(metadata, "strategy"),
                strategy_args=tuple(str(a) for a in _load(metadata, "strategy_args", [])),
                base=_text(metadata, "base"),
                base_hash=known_hash(_text(metadata, "base_hash")),
                carry=_text(metadata, "carry"),
                carry_hash=_text(metadata, "carry_hash"),
                blocks={
                    str(n): tuple(int(r) for r in b)
                    for n, b in dict(_load(metadata, "blocks", {})).items()
                },
                parents=tuple(_parent_from(p) for p in _load(metadata, "parents", [])),
                seeds=dict(_load(metadata, "seeds", {})),
                versions=dict(_load(metadata, "versions", {})),
                options=dict(_load(metadata, "options", {})),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LineageError(f"the lineage in the header is damaged ({error}).") from error

    @property
    def trained_by(self) -> str | None:
        """The strategy that the last task was trained with; None for what a tool put together."""
        return None if self.strategy.split(":")[0] in ("", *UNTRAINED) else self.strategy

    @property
    def triggers(self) -> tuple[str, ...]:
        """The words that call each task, oldest first."""
        return tuple(dict.fromkeys(t.concept for t in self.tasks if t.concept))

    def blocks_of(self, module: str) -> tuple[int, ...]:
        """The ranks stacked in a module, oldest first; empty if they were not recorded."""
        return tuple(self.blocks.get(module, self.blocks.get("*", ())))


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a header holds a lineage, damaged or not."""
    return f"{OWN_PREFIX}format" in metadata


def carry_hash_of(metadata: Mapping[str, str]) -> str | None:
    """Which carry a file says that it holds, be the rest of its lineage damaged or not."""
    return metadata.get(f"{OWN_PREFIX}carry_hash")


def mixed(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header of tensors that were mixed since it was written, by another tool or by us: it tells
    neither which carry this is nor the ranks of each task.
    """
    gone = (f"{OWN_PREFIX}carry_hash", f"{OWN_PREFIX}blocks")
    return {key: value for key, value in metadata.items() if key not in gone}


def derived(metadata: Mapping[str, str], parent: ParentFile | None) -> dict[str, str]:
    """The header of what was made from a file and is no longer this very model."""
    entries = {f"{OWN_PREFIX}carry": "delta"} if is_ours(metadata) else {}
    if parent is not None:
        entries[f"{OWN_PREFIX}parents"] = _dump([parent.to_json()])
    return {**mixed(metadata), **entries}


def how_made(
    truncation: Mapping[str, Any] | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Entries on what a tool did: ranks cut off, with the error; tasks weighed."""
    found = {"truncation": truncation, "weights": weights}
    return {
        OWN_PREFIX + name: json.dumps(value) for name, value in found.items() if value is not None
    }


def known_hash(text: str) -> str:
    """A base's hash, or "" where the text only says that there is none."""
    return "" if text in UNKNOWN_HASHES else text


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _text(metadata: Mapping[str, str], name: str) -> str:
    return metadata.get(OWN_PREFIX + name, "")


def _load(metadata: Mapping[str, str], name: str, default: Any) -> Any:
    value = json.loads(_text(metadata, name) or json.dumps(default))
    if not isinstance(value, type(default)):
        raise TypeError(f"{OWN_PREFIX}{name} is no {type(default).__name__}")
    return value


def _parent_from(data: Mapping[str, Any]) -> ParentFile:
    weight = data.get("weight")
    weight = None if weight is None else float(weight)
    return ParentFile(str(data["name"]), str(data["hash"]), weight)


def collect_blocks(ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Ranks stacked per module, the commonest under `*`: short enough for a header."""
    every = [tuple(blocks) for blocks in ranks.values()]
    if not every:
        return {}
    common = max(dict.fromkeys(every), key=every.count)
    named = {name: tuple(blocks) for name, blocks in ranks.items() if tuple(blocks) != common}
    return {"*": common, **named}
