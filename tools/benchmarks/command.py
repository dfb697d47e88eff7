"""The command line of tools/bench.py: which measurements, at which size; a table and JSON."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, format_table
from lcp_plugin.errors import ConfigError, LcpError
from lcp_plugin.telling.wording import counted

SIZES = {
    "tiny": "the embedded base, 48 px",
    "topo": "SDXL's topology at widths 64, 128, 256; boundaries on 1/16 of SDXL's own matrices",
    "sdxl": "SDXL's own shapes (560 matrices, 955,187,200 weights), synthetic weights",
}


def measurements() -> Mapping[str, tuple[Callable[[str], list[Row]], tuple[str, ...]]]:
    """Name -> (what measures it, the sizes that it knows)."""
    from benchmarks import boundaries, carries, images, on_disk, rehearsal, startup, steps

    def at(measure: Callable[[Any], list[Row]]) -> Callable[[str], list[Row]]:
        return lambda size: measure(boundaries.matrices_of(size))

    small, every = ("tiny", "topo"), tuple(SIZES)
    return {
        "step": (steps.measure_steps, small),
        "startup": (lambda size: startup.measure_startup(), small),
        "orthogonal": (at(boundaries.measure_orthogonal), every),
        "fuse": (at(boundaries.measure_fuse), every),
        "merge": (at(boundaries.measure_merge), every),
        "truncate": (at(boundaries.measure_truncation), every),
        "save": (on_disk.measure_save, every),
        "checkpoint": (on_disk.measure_checkpoint, every),
        "rounding": (carries.measure_rounding, every),
        "disk": (carries.measure_disk, every),
        "images": (images.measure_images, small),
        "rehearsal": (rehearsal.measure_rehearsal, small),
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Size, output and choice."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measures this project beside named baselines, both in this run.",
    )
    sizes = "; ".join(f"{name}: {words}" for name, words in SIZES.items())
    parser.add_argument("--size", choices=SIZES, default="tiny", help=sizes)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some measurements, by name")
    parser.add_argument(
        "--device",
        help="measure a card (cuda; cpu tries the same at a small size): steps, memory, chains and "
        "boundaries beside diffusers' example; --json gets one line a row, a profile beside it",
    )
    return parser.parse_args(argv)


def run_command(argv: Sequence[str]) -> str:
    """Measures; returns the table.

    Raises:
        ConfigError: an unknown measurement, or one that does not exist at this size.
    """
    arguments = parse_arguments(argv)
    if arguments.device:
        return run_on_card(arguments)
    known = measurements()
    chosen = arguments.only or [n for n, (_, sizes) in known.items() if arguments.size in sizes]
    for name in chosen:
        if name not in known or arguments.size not in known[name][1]:
            fitting = [n for n, (_, sizes) in known.items() if arguments.size in sizes]
            raise ConfigError(
                f"--only {name}: at --size {arguments.size} there are {', '.join(fitting)}."
            )
    _quieten()
    rows: list[Row] = []
    for name in chosen:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += known[name][0](arguments.size)
        if arguments.json:  # what is measured is not lost if a later one fails
            write_rows(arguments.json, arguments.size, rows)
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    return f"{machine}\n\n{format_table(rows)}"


def run_on_card(arguments: argparse.Namespace) -> str:
    """The table of a card.

    Raises:
        ConfigError: an unknown measurement. LcpError: some failed; the table of the others is in
            the message.
    """
    from benchmarks.card import Card
    from benchmarks.card_command import list_default, measure_card
    from benchmarks.card_command import measurements as known_on_card

    known = known_on_card()
    for name in arguments.only or ():
        if name not in known:
            raise ConfigError(f"--only {name}: with --device there are {', '.join(known)}.")
    _quieten()
    card = Card(arguments.size, arguments.device)
    rows, failed = measure_card(card, arguments.only or list_default(), arguments.json)
    text = f"{card.describe()}\n\n{format_table(rows)}"
    if failed:
        raise LcpError(f"{counted(failed, 'measurement')} failed, see above.\n{text}")
    return text


def write_rows(path: Path, size: str, rows: Sequence[Row]) -> None:
    """{"size", "machine", "rows"} as JSON, whole or not at all."""
    from lcp_plugin.formats.disk import write_json

    facts = {"size": size, "machine": describe_machine(), "rows": [r.to_json() for r in rows]}
    write_json(path, facts)


def describe_machine() -> dict[str, str]:
    """What the figures belong to."""
    import torch

    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _quieten() -> None:
    logging.basicConfig(level=logging.ERROR)
    for name in ("accelerate", "diffusers", "transformers", "PIL", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
