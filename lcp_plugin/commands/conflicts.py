"""What collides: opposed parameters, subspace overlap, energy lost; per block and overall.

    lcp conflicts out/objects                     # a run: figure 2 of arXiv 2410.04891
    lcp conflicts a.safetensors b.safetensors     # adapters trained apart

For a run the numbers go to conflicts.json in its folder, where the report finds them; --json and
--plot name other places.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcp_plugin.commands.front import command
from lcp_plugin.config.parser import Parser
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import counted

if TYPE_CHECKING:
    from lcp_plugin.delta import Delta
    from lcp_plugin.evaluation.conflicts import Pair


def build_parser() -> argparse.ArgumentParser:
    """What is compared, and where its numbers go."""
    parser = Parser("conflicts", __doc__, "RUN | LORA LORA ...")
    parser.add_argument("inputs", type=Path, nargs="+", help="one run folder, or LoRA files")
    parser.add_argument("--rank", type=int, default=0, help="also: what their sum loses at a rank")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--plot", type=Path, help="draw a chart here (.png, .svg, .pdf)")
    parser.add_argument("--blocks", action="store_true", help="print a line for each block too")
    return parser


def read_deltas(paths: Sequence[Path]) -> dict[str, Delta]:
    """Name -> delta of LoRA files; the stem is the name, numbered if it is not the only one."""
    from lcp_plugin.formats.lora_file import read_lora

    deltas: dict[str, Delta] = {}
    for path in paths:
        name = path.stem if path.stem not in deltas else f"{path.stem} ({len(deltas) + 1})"
        lora = read_lora(path)
        if lora.biases:
            print(
                f"{path.name}: its changes of {counted(len(lora.biases), 'bias')} are not compared"
            )
        deltas[name] = lora.total
    return deltas


def table(pairs: Sequence[Pair], blocks: bool) -> list[str]:
    """A line per pair (and block)."""
    head = ("first", "second", "b", "block", "ratio", "opposed", "zeros", "inputs", "outputs")
    rows = [head]
    for pair in pairs:
        facts = pair.to_json()
        every = {"all": facts, **(facts["blocks"] if blocks else {})}
        for block, values in every.items():
            keys = ("ratio", "opposed", "zeros", "row_overlap", "column_overlap")
            numbers = ["-" if values.get(k) is None else f"{values[k]:.3f}" for k in keys]
            rows.append((pair.first, pair.second, pair.reading, block, *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def draw(pairs: Sequence[Pair], path: Path) -> None:
    """Ratios of the first task (or adapter) against all later ones, per reading."""
    import io

    from matplotlib.figure import Figure

    from lcp_plugin.formats.disk import write_bytes

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    first = [pair for pair in pairs if pair.first == pairs[0].first]
    for reading in dict.fromkeys(pair.reading for pair in first):
        chosen = [pair for pair in first if pair.reading == reading]
        values = [pair.to_json().get("ratio") or 0.0 for pair in chosen]
        axes.plot([pair.second for pair in chosen], values, marker="o", label=reading)
    axes.set_ylabel(f"opposed-parameter ratio against {pairs[0].first}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    drawn, kind = io.BytesIO(), path.suffix.lstrip(".").lower() or "png"
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise ConfigError(f"--plot {path}: no chart is drawn as .{kind}, only {', '.join(known)}.")
    figure.savefig(drawn, format=kind, dpi=150)
    write_bytes(path, drawn.getvalue())


def compare(options: argparse.Namespace) -> tuple[list[Pair], dict[str, Any]]:
    """Pairs of tasks or files, and what is known beside them."""
    from lcp_plugin.delivery.merging import MergeOptions, merge_deltas
    from lcp_plugin.evaluation.conflicts import (
        compare_adapters,
        compare_boundaries,
        energy_lost,
        figure_two,
        open_boundaries,
    )

    facts: dict[str, Any] = {}
    if is_run(options.inputs):
        with open_boundaries(options.inputs[0].absolute()) as (names, at, modules):
            pairs = compare_boundaries(names, at, modules)
        facts["after"] = figure_two(names, pairs)
    elif len(options.inputs) < 2:
        raise ConfigError("one file has nothing to collide with; give two, or one run folder.")
    else:
        deltas = read_deltas(options.inputs)
        pairs = compare_adapters(deltas)
        if options.rank:
            merged = merge_deltas(list(deltas.values()), None, MergeOptions(rank=options.rank))
            facts["energy_lost"] = energy_lost(merged)
    return pairs, facts


def is_run(inputs: Sequence[Path]) -> bool:
    """Whether a run's folder was given, not files."""
    return len(inputs) == 1 and inputs[0].is_dir()


@command
def main(argv: Sequence[str]) -> int:
    """Prints the table and saves its numbers; returns the exit status."""
    options = build_parser().parse_args(argv)
    pairs, facts = compare(options)
    print("\n".join(table(pairs, options.blocks)))
    if "energy_lost" in facts:
        print(
            f"at rank {options.rank} their sum loses {facts['energy_lost']['']:.2%} of its energy"
        )
    facts["pairs"] = [pair.to_json() for pair in pairs]
    beside = options.inputs[0] / "conflicts.json" if is_run(options.inputs) else None
    if target := options.json or beside:
        from lcp_plugin.formats.disk import write_json

        write_json(target, facts)
    if options.plot:
        draw(pairs, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
