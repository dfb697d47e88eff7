"""Export what was learned: a LoRA for any reader, or fused into a checkpoint.

    lcp export out/objects.safetensors -o objects_r64.safetensors --as lora:64
    lcp export out/objects -o full.safetensors --as checkpoint --base sdxl.safetensors
    lcp export out/objects.safetensors -o no_can.safetensors --weights teapot=0.5 can=0

The input is a LoRA file of anyone's, a task folder or a run folder. Every export is read back and
compared with the model after the boundary before it takes its name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcp_plugin.commands.front import command
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.parser import Parser, finite
from lcp_plugin.errors import ConfigError, DiskError
from lcp_plugin.telling.wording import counted

if TYPE_CHECKING:
    from lcp_plugin.delivery.forms import Exported


SAVED_AS = option_fields()["save_precision"].metadata["choices"]


def build_parser() -> argparse.ArgumentParser:
    """What is exported, as what, where to."""
    parser = Parser("export", __doc__, "SOURCE -o OUTPUT")
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
    return parser


def parse_weights(texts: list[str]) -> dict[str, float]:
    """teapot=0.5 can=0 as a table. Raises ConfigError."""
    weights = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name:
            raise ConfigError(f"--weights {text}: wanted TASK=NUMBER.")
        if name in weights:
            raise ConfigError(f"--weights {text}: {name} has a weight already; give one.")
        try:
            weights[name] = finite(number)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--weights {text}: wanted TASK=NUMBER, {error}.") from None
    return weights


def find_base(name: str | None, output: Path, scratch: Path) -> Path | None:
    """The base on disk; a diffusers folder becomes a single file if one is to be written."""
    if name is None:
        return None
    from lcp_plugin.delivery.single_file import write_single_file
    from lcp_plugin.sdxl.load import find_base as find

    base = find(name, inpainting=True)
    if base.is_dir() and output.suffix == ".safetensors":
        write_single_file(base, scratch / "base.safetensors")
        return scratch / "base.safetensors"
    return base


def describe(done: Exported) -> list[str]:
    """What the user needs to know of an export."""
    size = f"{counted(done.modules, 'module')}, {done.bytes / 1e6:.1f} MB"
    lines = [f"{done.path}: {size}, read back and equal"]
    if done.errors:
        worst = sorted(done.errors.items(), key=lambda item: -item[1])[:5]
        most = "; most in" if any(done.errors.values()) else ""
        lines.append(f"truncation lost {done.error:.2%} of the update's norm{most}")
        lines += [f"  {error:.2%}  {name}" for name, error in worst if error]
    if done.rounding_share:
        lines.append(
            f"rounding to the base's precision lost {done.rounding_share:.2%} of the update"
        )
    if done.rounding_share > 0.1:
        lines.append("  that is much: fuse into an fp32 base, or use the LoRA itself")
    return lines


def export_as_asked(options: argparse.Namespace) -> Exported:
    """The export that the arguments describe, read back."""
    from lcp_plugin.delivery.export import export
    from lcp_plugin.delivery.forms import Form, check_output
    from lcp_plugin.delivery.learned import read_learned, weigh_tasks
    from lcp_plugin.formats.precisions import SAVED_AS as TYPES

    form = Form.parse(options.form)
    check_output(options.output, [options.source], is_folder=form.kind in ("peft", "checkpoint"))
    if options.base and form.kind != "checkpoint":
        raise ConfigError(f"--base is what a checkpoint is fused into; --as {form.kind} has none.")
    learned = read_learned(options.source)
    if options.weights:
        learned = weigh_tasks(learned, parse_weights(options.weights))
    beside = options.output.absolute().parent
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{beside} cannot be made ({error.strerror}); name another -o.") from error
    with tempfile.TemporaryDirectory(prefix=".lcp_", dir=beside) as scratch:
        base = find_base(options.base, options.output, Path(scratch))
        return export(learned, form, options.output, base, TYPES[options.precision])


@command
def main(argv: Sequence[str]) -> int:
    """Prints what was written; returns the exit status."""
    from lcp_plugin.formats.disk import explain_os_error

    options = build_parser().parse_args(argv)
    try:
        done = export_as_asked(options)
    except OSError as error:
        told = explain_os_error(error) or DiskError(f"{options.output}: {error.strerror}")
        raise told from error
    print("\n".join(describe(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
