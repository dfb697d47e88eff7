"""Merge LoRA files that were trained apart into one, exactly or by a rule; on deltas, not factors.

    python tools/merge_adapters.py a.safetensors b.safetensors -o both.safetensors
    python tools/merge_adapters.py a.safetensors b.safetensors -o c.safetensors --weights 1 -0.3
    python tools/merge_adapters.py a.safetensors b.safetensors -o c.safetensors --method ties
    python tools/merge_adapters.py a.safetensors b.safetensors -o full.safetensors --base sdxl/

Any layout, ranks and alphas; weights are linear. Before it merges it prints what will collide.
Methods: sum (exact), magmax, ties, dare, orthogonal; --rank truncates optimally afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from lcp_plugin import __version__
from lcp_plugin.delivery.export import Learned, check_output, export_checkpoint, export_lora
from lcp_plugin.delivery.merging import METHODS, Merged, MergeOptions, merge_deltas
from lcp_plugin.delta import Delta, Stacked
from lcp_plugin.errors import ConfigError, LcpError
from lcp_plugin.evaluation.conflicts import compare_adapters, energy_lost
from lcp_plugin.formats.foreign_header import summarise
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage, Source, collect_blocks
from lcp_plugin.formats.lora_file import LoraFile, find_lora, read_lora
from lcp_plugin.formats.precisions import SAVED_AS
from lcp_plugin.run.chaining import base_of_header
from lcp_plugin.store.deliverable_header import header_of_merge
from lcp_plugin.tasks import TaskRecord

PREDICTS = "modelspec.prediction_type"  # epsilon or v
BASE_KEYS = ("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="LoRA files of any kind, in order")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--weights", type=float, nargs="+", help="one for each file; 1 by default")
    parser.add_argument("--method", choices=METHODS, default="sum")
    parser.add_argument(
        "--density", type=float, default=0.0, help="ties (.2), dare (.5): kept share"
    )
    parser.add_argument("--energy", type=float, default=1.0, help="orthogonal: protected share")
    parser.add_argument("--scale", type=float, default=1.0, help="of the result")
    parser.add_argument("--rank", type=int, default=0, help="truncate to; 0 keeps all")
    parser.add_argument("--seed", type=int, default=0, help="dare")
    parser.add_argument("--base", type=Path, help="fuse into this checkpoint or diffusers folder")
    parser.add_argument("--precision", choices=SAVED_AS, default="float")
    parser.add_argument("--quiet", action="store_true", help="do not measure collisions first")
    return parser.parse_args(arguments)


def print_collisions(names: Sequence[str], deltas: Sequence[Delta]) -> None:
    """A line per pair: what pulls apart, and what shares directions; the worst block of each."""
    unique = {f"{i}. {name}": d for i, (name, d) in enumerate(zip(names, deltas, strict=True), 1)}
    for pair in compare_adapters(unique):
        facts = pair.to_json()
        worst = max(facts["blocks"].items(), key=lambda item: item[1]["opposed"] or 0.0)
        print(
            f"{pair.first} / {pair.second}: signs opposed {facts['opposed']:.1%} of entries "
            f"(most in {worst[0]}, {worst[1]['opposed']:.1%}), shared inputs "
            f"{facts['row_overlap']:.3f}, shared outputs {facts['column_overlap']:.3f}"
        )


def common_base(loras: Sequence[LoraFile]) -> tuple[str, str]:
    """Name and hash of the base if all files name the same one; says so where they differ.

    The hash is ours where every file has our lineage; else the names and hashes that kohya's
    headers give are compared, and only the name goes on.
    """
    lineages = [Lineage.from_metadata(lora.metadata) for lora in loras]
    own = [(known.base, known.base_hash) for known in lineages if known and known.base_hash]
    every = len(own) == len(loras)
    said = own if every else [base_of_header(lora.metadata, None) for lora in loras]
    names = {PurePath(name).name for name, _ in said if name not in ("", "None")}
    hashes = {digest for _, digest in said if digest}
    if len(hashes) > 1 or len({digest for _, digest in own}) > 1:
        print(
            f"trained on different bases ({', '.join(sorted(names))}): "
            "the sum fits none of them exactly"
        )
        return "", ""
    if every:
        return own[0]
    whole = len(names) == 1 and all(name not in ("", "None") for name, _ in said)
    return (names.pop(), "") if whole else ("", "")


def common_words(files: Sequence[Path], loras: Sequence[LoraFile]) -> dict[str, str]:
    """What all headers say alike of their base and of what it predicts; "" takes an entry away.

    Says so where some are for a base that predicts v and some for one that predicts noise.
    """
    headers = [lora.metadata for lora in loras]
    kinds = {
        path: header.get(PREDICTS, "")[:1] for path, header in zip(files, headers, strict=True)
    }
    v, noise = ([path.name for path, kind in kinds.items() if kind == k] for k in ("v", "e"))
    words = {key: headers[0][key] for key in BASE_KEYS if headers[0].get(key, "None") != "None"}
    words = {k: text for k, text in words.items() if all(h.get(k) == text for h in headers)}
    if v and noise:
        print(
            f"{', '.join(v)} is for a base that predicts v, {', '.join(noise)} for one that "
            "predicts noise: the sum fits neither exactly, and its header names neither"
        )
        return {**words, PREDICTS: ""}
    return {**words, PREDICTS: "v"} if v else words


def number_tasks(records: Sequence[TaskRecord]) -> tuple[TaskRecord, ...]:
    """The tasks of all files in order, told apart by name: `can`, `can_2`."""
    tasks: list[TaskRecord] = []
    for index, record in enumerate(records, 1):
        taken, number, name = {task.name for task in tasks}, 2, record.name
        while name in taken:
            name, number = f"{record.name}_{number}", number + 1
        tasks.append(replace(record, index=index, name=name))
    return tuple(tasks)


def describe_merge(
    files: Sequence[Path], loras: Sequence[LoraFile], options: argparse.Namespace, merged: Merged
) -> dict[str, str]:
    """The header of the result: every file's tasks, the files by hash, the method."""
    weights = options.weights or [1.0] * len(files)
    records: list[TaskRecord] = []
    for file, lora in zip(files, loras, strict=True):
        lineage = Lineage.from_metadata(lora.metadata)
        words = summarise(lora.metadata).triggers or (file.stem,)
        found = lineage.tasks if lineage and lineage.tasks else None
        records += found or [TaskRecord(0, file.stem, "object", word) for word in words[:1]]
    base, base_hash = common_base(loras)
    tasks = number_tasks(records)
    arguments = [
        f"{k}={getattr(options, k)}" for k in ("density", "energy", "scale", "rank", "seed")
    ]
    stacked = {n: e.blocks for n, e in merged.delta.items() if isinstance(e, Stacked)}
    lineage = Lineage(
        tasks=tasks,
        strategy=f"merge:{options.method}",
        strategy_args=tuple(arguments),
        base=base,
        base_hash=base_hash,
        carry="delta",
        blocks=collect_blocks(stacked) if len(stacked) == len(merged.delta) else {},
        parents=tuple(
            Source(file.name, file_model_hash(find_lora(file)), weight)
            for file, weight in zip(files, weights, strict=True)
        ),
        versions={"lcp_plugin": __version__},
    )
    error = {"ss_lcp_truncation": json.dumps({"rank": options.rank, "error": merged.error})}
    extra = {**common_words(files, loras), **(error if options.rank else {})}
    return header_of_merge(lineage, options.output.stem, [file.stem for file in files], extra)


def merge(options: argparse.Namespace) -> list[str]:
    """Read, measure, merge and write; the lines to print."""
    check_output(options.output)
    weights = options.weights
    if weights is not None and len(weights) != len(options.files):
        raise ConfigError(
            f"{len(options.files)} files and {len(weights)} weights; give one for each."
        )
    loras = [read_lora(file) for file in options.files]
    deltas = [lora.total for lora in loras]
    if not options.quiet and len(deltas) > 1:
        print_collisions([file.stem for file in options.files], deltas)
    how = MergeOptions(
        options.method, options.density, options.energy, options.scale, options.rank, options.seed
    )
    merged = merge_deltas(deltas, weights, how)
    if not merged.delta:
        raise ConfigError("nothing is left of the merge: all weights are 0.")
    metadata = describe_merge(options.files, loras, options, merged)
    learned = Learned(merged.delta.as_adapter(), metadata)
    lines = []
    if options.rank:
        lost = energy_lost(merged)
        shares = ", ".join(f"{block} {share:.1%}" for block, share in lost.items() if block)
        print(f"energy lost at rank {options.rank}: {lost['']:.2%} ({shares})")
    if options.base:
        done = export_checkpoint(learned, options.base, options.output)
        lines.append(f"rounding to the base's precision lost {done.rounding_share:.2%}")
    else:
        done = export_lora(learned, options.output, dtype=SAVED_AS[options.precision])
    return [
        *lines,
        f"{done.path}: {done.modules} modules, {done.bytes / 1e6:.1f} MB, read back and equal",
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        print("\n".join(merge(options)))
    except LcpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
