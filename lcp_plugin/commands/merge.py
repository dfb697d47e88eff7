"""Merge LoRA files that were trained apart into one, exactly or by a rule; on deltas, not factors.

    lcp merge a.safetensors b.safetensors -o both.safetensors
    lcp merge a.safetensors b.safetensors -o c.safetensors --weights 1 -0.3
    lcp merge a.safetensors b.safetensors -o c.safetensors --method ties
    lcp merge a.safetensors b.safetensors -o full.safetensors --base sdxl/

Any layout, ranks and alphas; weights are linear. Before it merges it prints what will collide.
Methods: sum (exact), magmax, ties, dare, orthogonal; --rank truncates optimally afterwards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcp_plugin.commands.front import command
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.parser import Parser, finite, seed
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import counted

if TYPE_CHECKING:
    from lcp_plugin.delivery.learned import Learned
    from lcp_plugin.delivery.merge_header import MergedFile
    from lcp_plugin.delta import Delta


SAVED_AS = option_fields()["save_precision"].metadata["choices"]


def build_parser() -> argparse.ArgumentParser:
    """What is merged, by which rule, where to."""
    parser = Parser("merge", __doc__, "LORA LORA ... -o OUTPUT")
    parser.add_argument("files", type=Path, nargs="+", help="LoRA files of any kind, in order")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--weights", type=finite, nargs="+", help="one for each file; 1 by default")
    parser.add_argument("--method", default="sum", help="one of the above (sum)")
    parser.add_argument(
        "--density", type=float, default=0.0, help="ties (.2), dare (.5): kept share"
    )
    parser.add_argument("--energy", type=float, default=1.0, help="orthogonal: protected share")
    parser.add_argument("--scale", type=finite, default=1.0, help="of the result")
    parser.add_argument("--rank", type=int, default=0, help="truncate to; 0 keeps all")
    parser.add_argument("--seed", type=seed, default=0, help="dare")
    parser.add_argument("--base", type=Path, help="fuse into this checkpoint or diffusers folder")
    parser.add_argument("--precision", choices=SAVED_AS, default="float")
    parser.add_argument("--quiet", action="store_true", help="do not measure collisions first")
    return parser


def print_collisions(names: Sequence[str], deltas: Sequence[Delta]) -> None:
    """A line per pair: what pulls apart, and what shares directions; the worst block of each."""
    from lcp_plugin.evaluation.conflicts import compare_adapters

    unique = {f"{i}. {name}": d for i, (name, d) in enumerate(zip(names, deltas, strict=True), 1)}
    for pair in compare_adapters(unique):
        facts = pair.to_json()
        worst = max(facts["blocks"].items(), key=lambda item: item[1]["opposed"] or 0.0)
        print(
            f"{pair.first} / {pair.second}: signs opposed {facts['opposed']:.1%} of entries "
            f"(most in {worst[0]}, {worst[1]['opposed']:.1%}), shared inputs "
            f"{facts['row_overlap']:.3f}, shared outputs {facts['column_overlap']:.3f}"
        )


def merge(options: argparse.Namespace) -> list[str]:
    """Read, measure, merge and write; the lines to print."""
    from lcp_plugin.delivery.forms import check_output
    from lcp_plugin.delivery.learned import Learned
    from lcp_plugin.delivery.merge_header import describe_merge
    from lcp_plugin.delivery.merging import MergeOptions, merge_biases, merge_deltas
    from lcp_plugin.evaluation.conflicts import energy_lost

    check_output(options.output, options.files, is_folder=options.base is not None)
    files = read_files(options.files, options.weights)
    deltas = [file.lora.total for file in files]
    if not options.quiet and len(deltas) > 1:
        print_collisions([file.path.stem for file in files], deltas)
    how = MergeOptions(
        options.method, options.density, options.energy, options.scale, options.rank, options.seed
    )
    merged = merge_deltas(deltas, [file.weight for file in files], how)
    biases = merge_biases([file.lora.biases for file in files], [f.weight for f in files], how)
    if not merged.delta and not biases:
        raise ConfigError("nothing is left of the merge: all weights, or the scale, are 0.")
    header, said = describe_merge(files, how, merged, options.output.stem)
    for line in said:
        print(line)
    if options.rank:
        lost = energy_lost(merged)
        shares = ", ".join(f"{block} {share:.1%}" for block, share in lost.items() if block)
        print(f"energy lost at rank {options.rank}: {lost['']:.2%} ({shares})")
    return write(Learned(merged.delta.as_adapter(), header, biases=biases), options)


def read_files(paths: Sequence[Path], weights: Sequence[float] | None) -> list[MergedFile]:
    """The files with their weights. Raises ConfigError for another number of weights."""
    if weights is not None and len(weights) != len(paths):
        files, given = counted(len(paths), "file"), counted(len(weights), "weight")
        raise ConfigError(f"{files} and {given}; give one for each.")
    from lcp_plugin.delivery.merge_header import MergedFile
    from lcp_plugin.formats.lora_file import read_lora

    each = weights or [1.0] * len(paths)
    return [MergedFile(p, read_lora(p), w) for p, w in zip(paths, each, strict=True)]


def write(learned: Learned, options: argparse.Namespace) -> list[str]:
    """A checkpoint where a base is given, else a LoRA; the lines to print."""
    from lcp_plugin.delivery.checkpoint import export_checkpoint
    from lcp_plugin.delivery.export import export_lora
    from lcp_plugin.formats.precisions import SAVED_AS as TYPES
    from lcp_plugin.sdxl.load import find_base

    lines = []
    if options.base:
        base = find_base(str(options.base), inpainting=True)
        done = export_checkpoint(learned, base, options.output)
        lines.append(f"rounding to the base's precision lost {done.rounding_share:.2%}")
    else:
        done = export_lora(learned, options.output, dtype=TYPES[options.precision])
    size = f"{done.bytes / 1e6:.1f} MB"
    return [*lines, f"{done.path}: {counted(done.modules, 'module')}, {size}, read back and equal"]


@command
def main(argv: Sequence[str]) -> int:
    """Prints what collides and what was written; returns the exit status."""
    print("\n".join(merge(build_parser().parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
