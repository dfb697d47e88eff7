"""The header of a merge: every file's tasks, what all files say alike of their base, the files.

What they say differently is left out of the header and told to the caller in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath

from lcp_plugin import __version__
from lcp_plugin.delivery.merging import Merged, MergeOptions
from lcp_plugin.delta import Stacked
from lcp_plugin.formats.foreign_header import named_base, read_claims
from lcp_plugin.formats.header import PREDICTS, base_words
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage, ParentFile, collect_blocks
from lcp_plugin.formats.lora_file import LoraFile, find_lora
from lcp_plugin.store.deliverable_header import merged_header
from lcp_plugin.tasks import TaskRecord

ARGUMENTS = ("density", "energy", "scale", "rank", "seed")  # of MergeOptions, as they are recorded


@dataclass(frozen=True)
class MergedFile:
    """A file that went into a merge."""

    path: Path
    lora: LoraFile
    weight: float

    @property
    def lineage(self) -> Lineage | None:
        """What its header says of its making, if we wrote it."""
        return Lineage.from_metadata(self.lora.metadata)

    def tasks(self) -> list[TaskRecord]:
        """Those of its lineage; of a foreign file one, called by its first trigger word."""
        lineage = self.lineage
        if lineage is not None and lineage.tasks:
            return list(lineage.tasks)
        words = read_claims(self.lora.metadata).triggers or (self.path.stem,)
        return [TaskRecord(0, self.path.stem, "object", words[0])]

    def as_parent(self) -> ParentFile:
        """How the merge's header names it."""
        return ParentFile(self.path.name, file_model_hash(find_lora(self.path)), self.weight)


def describe_merge(
    files: Sequence[MergedFile], options: MergeOptions, merged: Merged, title: str
) -> tuple[dict[str, str], list[str]]:
    """The header of the result, and what is to be said of files that do not go together."""
    base, base_hash, said_of_base = common_base(files)
    words, said_of_prediction = common_words(files)
    stacked = {n: e.blocks for n, e in merged.delta.items() if isinstance(e, Stacked)}
    values = asdict(options)
    lineage = Lineage(
        tasks=number_tasks([task for file in files for task in file.tasks()]),
        strategy=f"merge:{options.method}",
        strategy_args=tuple(f"{name}={values[name]}" for name in ARGUMENTS),
        base=base,
        base_hash=base_hash,
        carry="delta",
        blocks=collect_blocks(stacked) if len(stacked) == len(merged.delta) else {},
        parents=tuple(file.as_parent() for file in files),
        versions={"lcp_plugin": __version__},
    )
    cut = {"rank": options.rank, "error": merged.error} if options.rank else None
    names = [file.path.stem for file in files]
    return merged_header(lineage, title, names, words, cut), [*said_of_base, *said_of_prediction]


def common_base(files: Sequence[MergedFile]) -> tuple[str, str, list[str]]:
    """Name and hash of the base if all files name the same one, and what is to be said.

    The hash is ours where every file has our lineage; else the names and hashes that kohya's
    headers give are compared, and only the name goes on.
    """
    lineages = [file.lineage for file in files]
    own = [(known.base, known.base_hash) for known in lineages if known and known.base_hash]
    every = len(own) == len(files)
    named = own if every else [named_base(file.lora.metadata) for file in files]
    names = {PurePath(name).name for name, _ in named if name}
    hashes = {digest for _, digest in named if digest}
    if len(hashes) > 1 or len({digest for _, digest in own}) > 1:
        told = f"trained on different bases ({', '.join(sorted(names))}): "
        return "", "", [f"{told}the sum fits none of them exactly"]
    if every:
        return (*own[0], [])
    whole = len(names) == 1 and all(name for name, _ in named)
    return names.pop() if whole else "", "", []


def common_words(files: Sequence[MergedFile]) -> tuple[dict[str, str], list[str]]:
    """What all headers say alike of their base and of what it predicts; "" takes an entry away.

    Said is where some are for a base that predicts v and some for one that predicts noise.
    """
    headers = [file.lora.metadata for file in files]
    kinds = [header.get(PREDICTS, "")[:1] for header in headers]
    v, noise = (
        [file.path.name for file, kind in zip(files, kinds, strict=True) if kind == wanted]
        for wanted in ("v", "e")
    )
    words = base_words(headers[0])
    words = {key: text for key, text in words.items() if all(h.get(key) == text for h in headers)}
    if v and noise:
        return {**words, PREDICTS: ""}, [
            f"{', '.join(v)} is for a base that predicts v, {', '.join(noise)} for one that "
            "predicts noise: the sum fits neither exactly, and its header names neither"
        ]
    return ({**words, PREDICTS: "v"} if v else words), []


def number_tasks(records: Sequence[TaskRecord]) -> tuple[TaskRecord, ...]:
    """The tasks of all files in order, told apart by name: `can`, `can_2`."""
    tasks: list[TaskRecord] = []
    for index, record in enumerate(records, 1):
        taken, number, name = {task.name for task in tasks}, 2, record.name
        while name in taken:
            name, number = f"{record.name}_{number}", number + 1
        tasks.append(replace(record, index=index, name=name))
    return tuple(tasks)
