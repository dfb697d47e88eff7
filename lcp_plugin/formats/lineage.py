"""What a file knows of its making: tasks, strategy, base, parents by hash (`ss_lcp_*` keys).

A header is text to text. These keys are ours, other readers ignore them; `header` writes those that
others read. Parents are named by `sshs_model_hash`, which depends on tensors only, so that they can
be verified even if their metadata was edited. Everything read is data: no path in it is followed
here, nothing in it is run, and what cannot be understood is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lcp_plugin.errors import LineageError
from lcp_plugin.tasks import TaskRecord

HEADER_FORMAT = "1"
UNTRAINED = ("merge", "export")  # before a colon or alone: a tool made the file, no strategy
UNKNOWN_HASHES = ("", "None", "NOFILE", "IsADirectory")  # what sd-scripts says of no single file


@dataclass(frozen=True)
class Source:
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
    parents: tuple[Source, ...] = ()  # a chain has one at most, a merge several
    seeds: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # as a config holds them

    def to_metadata(self) -> dict[str, str]:
        """Header entries; what is empty is left out."""
        values = {
            "ss_lcp_format": HEADER_FORMAT,
            "ss_lcp_tasks": _dump([t.to_json() for t in self.tasks]),
            "ss_lcp_strategy": self.strategy,
            "ss_lcp_strategy_args": _dump(list(self.strategy_args)),
            "ss_lcp_base": self.base,
            "ss_lcp_base_hash": self.base_hash,
            "ss_lcp_carry": self.carry,
            "ss_lcp_carry_hash": self.carry_hash,
            "ss_lcp_blocks": _dump({n: list(b) for n, b in self.blocks.items()}),
            "ss_lcp_parents": _dump([p.to_json() for p in self.parents]),
            "ss_lcp_seeds": _dump(dict(self.seeds)),
            "ss_lcp_versions": _dump(dict(self.versions)),
            "ss_lcp_options": _dump(dict(self.options)),
        }
        return {key: value for key, value in values.items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Lineage | None:
        """What a header says; None if it has no `ss_lcp_*` keys.

        Raises:
            LineageError: our keys are there, but damaged or of a newer version.
        """
        found = metadata.get("ss_lcp_format")
        if found is None:
            return None
        if found != HEADER_FORMAT:
            raise LineageError(
                f"the lineage is of format {found[:20]}, this version reads {HEADER_FORMAT}; "
                "update lcp_plugin."
            )
        try:
            return cls(
                tasks=tuple(TaskRecord.from_json(t) for t in _load(metadata, "tasks", [])),
                strategy=metadata.get("ss_lcp_strategy", ""),
                strategy_args=tuple(str(a) for a in _load(metadata, "strategy_args", [])),
                base=metadata.get("ss_lcp_base", ""),
                base_hash=known_hash(metadata.get("ss_lcp_base_hash", "")),
                carry=metadata.get("ss_lcp_carry", ""),
                carry_hash=metadata.get("ss_lcp_carry_hash", ""),
                blocks={
                    str(n): tuple(int(r) for r in b)
                    for n, b in dict(_load(metadata, "blocks", {})).items()
                },
                parents=tuple(_source_from(p) for p in _load(metadata, "parents", [])),
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


def known_hash(text: str) -> str:
    """A base's hash, or "" where the text only says that there is none."""
    return "" if text in UNKNOWN_HASHES else text


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _load(metadata: Mapping[str, str], name: str, default: Any) -> Any:
    value = json.loads(metadata.get(f"ss_lcp_{name}") or json.dumps(default))
    if not isinstance(value, type(default)):
        raise TypeError(f"ss_lcp_{name} is no {type(default).__name__}")
    return value


def _source_from(data: Mapping[str, Any]) -> Source:
    weight = data.get("weight")
    return Source(str(data["name"]), str(data["hash"]), None if weight is None else float(weight))


def collect_blocks(ranks: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Ranks stacked per module, the commonest under `*`: short enough for a header."""
    every = [tuple(blocks) for blocks in ranks.values()]
    if not every:
        return {}
    common = max(dict.fromkeys(every), key=every.count)
    named = {name: tuple(blocks) for name, blocks in ranks.items() if tuple(blocks) != common}
    return {"*": common, **named}
