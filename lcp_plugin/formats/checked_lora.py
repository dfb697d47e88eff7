"""LoRA files that are read back, tensor by tensor, before they count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.biases import Biases
from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.disk import replacing
from lcp_plugin.formats.lora_file import read_lora, write_lora

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of ||D||


def check_lora(
    path: Path, adapter: Adapter, dtype: torch.dtype, biases: Biases | None = None
) -> None:
    """Reads a file back and compares its updates with the adapter's, within `dtype`'s rounding.

    Raises:
        FileFormatError: it is not what was meant.
    """
    file = read_lora(path)
    back = file.total
    _check_biases(path, file.biases, biases or Biases(), dtype)
    if set(back) != set(adapter):
        raise FileFormatError(f"{path.name} reads back with other modules than were written.")
    for name, factors in adapter.items():
        wanted, got = factors.update(), back[name].dense()
        if float((got - wanted).norm()) > TOLERANCE[dtype] * float(wanted.norm()) + 1e-12:
            raise FileFormatError(
                f"{path.name}: {name} does not read back as the update that was meant: {dtype} "
                "cannot hold it; use fp32 or bf16."
            )


def write_checked_lora(
    path: str | Path,
    adapter: Adapter,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    biases: Biases | None = None,
) -> float:
    """`write_lora`, and the file is read back, tensor by tensor, before it takes `path`'s place.

    Returns:
        the share of a module's factors that rounding to `dtype` took, where it took most.
    Raises:
        FileFormatError: what came back is not what was written; the old file is untouched.
        NumericError: values that `dtype` cannot hold.
    """
    path = Path(path)
    with replacing(path) as temporary:
        written = write_lora(temporary, adapter, metadata, dtype, biases=biases)
        back = read_lora(temporary)
        if back.delta or set(back.adapter) != set(adapter) or back.metadata != written:
            raise _not_as_written(path, "other modules or another header")
        _check_biases(path, back.biases, biases or Biases(), dtype)
        return max(
            (_lost(path, n, f, back.adapter[n], dtype) for n, f in adapter.items()), default=0
        )


def _check_biases(path: Path, got: Biases, meant: Biases, dtype: torch.dtype) -> None:
    """Raises FileFormatError where a change of a bias came back as another one."""
    rounded = meant.map(lambda change: change.to(dtype).float())
    if got.keys() != rounded.keys() or any(not torch.equal(got[n], rounded[n]) for n in got):
        raise _not_as_written(path, "other changes of biases")


def _lost(path: Path, name: str, meant: Factors, back: Factors, dtype: torch.dtype) -> float:
    """What rounding took of one module, as a share of its factors. Raises FileFormatError."""
    share = 0.0
    for wanted, got in ((meant.down, back.down), (meant.up, back.up)):
        if back.alpha != meant.alpha or not torch.equal(got, wanted.to(dtype).float()):
            raise _not_as_written(path, name)
        size = float(wanted.norm()) if dtype is not torch.float32 else 0.0
        share += (float((got - wanted).norm()) / size) ** 2 if size else 0.0
    return math.sqrt(share)


def _not_as_written(path: Path, what: str) -> FileFormatError:
    return FileFormatError(
        f"{path.name} does not read back as it was written ({what}); the file before it is "
        "untouched. Look after disk and memory of this machine, and run the same command again."
    )
