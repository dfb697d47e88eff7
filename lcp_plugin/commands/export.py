"""Export what was learned: a LoRA for any reader, or fused into a checkpoint.

    python tools/export.py out/objects.safetensors -o objects_r64.safetensors --as lora:64
    python tools/export.py out/objects -o full.safetensors --as checkpoint --base sdxl.safetensors
    python tools/export.py out/objects.safetensors -o no_can.safetensors --weights teapot=0.5 can=0

The input is a LoRA file of anyone's, a task folder or a run folder. Every export is read back and
compared with the model after the boundary before it takes its name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from lcp_plugin.delivery.export import export
from lcp_plugin.delivery.forms import Exported, Form, check_output
from lcp_plugin.delivery.learned import read_learned, weigh_tasks
from lcp_plugin.errors import ConfigError, LcpError
from lcp_plugin.formats.precisions import SAVED_AS


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a LoRA file, a task folder or a run folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file or folder to write")
    parser.add_argument(
        "--as",
        dest="form",
        default="lora",
        help="lora (default), lora:RANK, diff, diffusers, peft or checkpoint",
    )
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="TASK=WEIGHT", help="of an additive chain"
    )
    parser.add_argument("--base", help="checkpoint: the base to fuse into (file, folder or name)")
    parser.add_argument(
        "--precision", choices=SAVED_AS, default="float", help="of a LoRA's factors"
    )
    return parser.parse_args(arguments)


def parse_weights(texts: list[str]) -> dict[str, float]:
    """teapot=0.5 can=0 as a table. Raises ConfigError."""
    weights = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError as error:
            raise ConfigError(f"--weights {text}: wanted TASK=NUMBER.") from error
    return weights


def find_base(name: str | None, output: Path, scratch: Path) -> Path | None:
    """The base on disk; a diffusers folder becomes a single file if one is to be written."""
    if name is None:
        return None
    from lcp_plugin.delivery.single_file import write_single_file
    from lcp_plugin.sdxl.load import find_base as find

    base = find(name)
    if base.is_dir() and output.suffix == ".safetensors":
        write_single_file(base, scratch / "base.safetensors")
        return scratch / "base.safetensors"
    return base


def describe(done: Exported) -> list[str]:
    """What the user needs to know of an export."""
    lines = [f"{done.path}: {done.modules} modules, {done.bytes / 1e6:.1f} MB, read back and equal"]
    if done.errors:
        worst = sorted(done.errors.items(), key=lambda item: -item[1])[:5]
        lines.append(f"truncation lost {done.error:.2%} of the update's norm; most in")
        lines += [f"  {error:.2%}  {name}" for name, error in worst if error]
    if done.rounding_share:
        lines.append(
            f"rounding to the base's precision lost {done.rounding_share:.2%} of the update"
        )
    if done.rounding_share > 0.1:
        lines.append("  that is much: fuse into an fp32 base, or use the LoRA itself")
    return lines


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        check_output(options.output)
        form = Form.parse(options.form)
        learned = read_learned(options.source)
        if options.weights:
            learned = weigh_tasks(learned, parse_weights(options.weights))
        with tempfile.TemporaryDirectory(
            prefix=".lcp_", dir=options.output.absolute().parent
        ) as scratch:
            base = find_base(options.base, options.output, Path(scratch))
            precision = SAVED_AS[options.precision]
            done = export(learned, form, options.output, base, precision)
    except LcpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"DiskError: {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    print("\n".join(describe(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
