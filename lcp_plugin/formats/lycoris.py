"""One module's tensors in a LoRA file -> its update, for every kind of adapter that can be added.

    LoRA   D = (alpha / r) B A; with a Tucker core M, A'[p, ckl] = sum_q M[p, q, k, l] A[q, c]
    LoHa   D = (alpha / r) (W1a W1b) * (W2a W2b), elementwise (FedPara, arXiv 2108.06098)
    LoKr   D = (alpha / r) kron(W1, W2), W2 = W2a W2b if given so; alpha / r = 1 if both are full
    full   D = diff
    any    d = diff_b, the change of the layer's bias, beside its matrix or alone

(LyCORIS, arXiv 2309.14859; its Tucker forms contract t[i, j, k, l] with a[i, out] and b[j, in].)
A missing alpha, or 0, means the rank, as kohya and diffusers read it. DoRA rescales the columns of
the base weight, which is no change that adds up: refused. lycoris-lora is not needed: the formulas
are short, and it serves as a reference in the tests.

Another kind of adapter is a function that forms its matrix and a row of `KINDS`, nothing else; one
that is known and not read is a row of `UNREAD`, for the message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcp_plugin.adapter import Factors, Kernel
from lcp_plugin.delta import Dense
from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.keys import kernel_of
from lcp_plugin.telling.wording import counted

MAX_ELEMENTS = 1 << 27  # of one matrix; SDXL's largest has 2^25


def build_factors(
    module: str, parts: dict[str, Tensor], alpha_of: Callable[[str, int], float]
) -> Factors:
    """The factors of a plain LoRA module, its Tucker core multiplied into A.

    Args:
        alpha_of: (module, rank) -> alpha, for a module that has no tensor for it.
    Raises:
        FileFormatError: parts that are missing, foreign, or do not fit together.
    """
    _refuse_foreign_parts(module, parts, {"down", "up", "mid", "alpha", "scalar"})
    _require_parts(module, parts, {"down", "up"})
    floats = _as_floats(module, parts)
    down, up = floats["down"], floats["up"].flatten(1)  # (rank, in, ...), (out, rank)
    if "mid" in parts:
        down = _multiply(module, parts, "pq...,qc->pc...", floats["mid"], down.flatten(1))
    if down.dim() not in (2, 4) or not down.numel() or not up.numel():
        raise _misfit(module, parts)
    kernel: Kernel | None = (down.shape[2], down.shape[3]) if down.dim() == 4 else None
    alpha = _read_alpha(module, parts)
    if alpha is None:
        alpha = alpha_of(module, down.shape[0])
    if "scalar" in floats:
        up = up * floats["scalar"].reshape(())
    return Factors(down.flatten(1), up, alpha, kernel)


def _as_floats(module: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for part, tensor in parts.items():
        if part != "alpha" and not tensor.dtype.is_floating_point:
            raise FileFormatError(f"{part} of {module} is of type {tensor.dtype}, wanted floats.")
        if part == "scalar" and tensor.numel() != 1:
            raise _misfit(module, parts)
        if part not in ("alpha", "scalar") and tensor.dim() < 2:
            raise _misfit(module, parts)
    return {  # copied: nothing stays mapped to a file that may be replaced
        part: tensor.to(torch.float32, copy=True)
        for part, tensor in parts.items()
        if part != "alpha"
    }


def _misfit(module: str, parts: Mapping[str, Tensor]) -> FileFormatError:
    shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
    return FileFormatError(f"{module} has parts that do not fit together: {shapes}.")


def _multiply(module: str, parts: Mapping[str, Tensor], formula: str, *factors: Tensor) -> Tensor:
    """einsum; shapes that do not multiply or a result that no SDXL layer has are refused."""
    inputs, output = formula.split("->")
    sizes = {
        letter: size
        for letters, factor in zip(inputs.split(","), factors, strict=True)
        for letter, size in zip(letters.replace("...", ""), factor.shape, strict=False)
    }
    rest = math.prod(math.prod(f.shape[2:]) for f in factors)
    if rest * math.prod(sizes[letter] for letter in output.replace("...", "")) > MAX_ELEMENTS:
        raise _misfit(module, parts)
    try:
        return torch.einsum(formula, *factors)
    except RuntimeError as error:
        raise _misfit(module, parts) from error


def _read_alpha(module: str, parts: Mapping[str, Tensor]) -> float | None:
    """The module's alpha; None where it is missing or 0, which readers take for the rank."""
    if "alpha" not in parts:
        return None
    if parts["alpha"].numel() != 1:
        raise FileFormatError(f"the alpha of {module} is no single number.")
    alpha = float(parts["alpha"].reshape(()))
    if not abs(alpha) < 1e7:  # NaN too; an integer that is really a float's bits has 1e9
        raise FileFormatError(f"the alpha of {module} is {alpha}; the file is damaged.")
    return alpha or None


def _refuse_foreign_parts(module: str, parts: Mapping[str, Tensor], allowed: set[str]) -> None:
    if "dora_scale" in parts:
        raise FileFormatError(
            f"{module} is a DoRA (dora_scale), which rescales base weights and cannot be added to "
            "other changes; fuse it into a checkpoint with the tool that made it and train on that."
        )
    foreign = sorted(set(parts) - allowed)
    if foreign:
        raise FileFormatError(f"{module} mixes kinds of adapters: {', '.join(sorted(parts))}.")


def build_dense(
    module: str, parts: dict[str, Tensor], scale_of: Callable[[str], float | None]
) -> Dense:
    """The matrix of a LoHa, LoKr or full-diff module.

    Args:
        scale_of: module -> alpha / rank of a LoHa or LoKr that has no alpha tensor, if it is known.
    Raises:
        FileFormatError: as `build_factors`.
    """
    kind = next((k for k in KINDS if any(part.startswith(k.beginning) for part in parts)), None)
    if kind is None:
        _refuse_foreign_parts(module, parts, {"alpha", "scalar"})
        raise FileFormatError(f"{module} has only {', '.join(sorted(parts))}: no factors.")
    _refuse_foreign_parts(module, parts, {*kind.parts, "alpha", "scalar"})
    weight = kind.build(module, parts, _as_floats(module, parts))  # (out, in) or (out, in, k, l)
    scale = scale_of(module) if kind.is_scaled and "alpha" not in parts else None
    if scale is not None:
        weight = weight * scale
    if "scalar" in parts:
        weight = weight * parts["scalar"].float().reshape(())
    if weight.dim() not in (2, 4) or not weight.numel():
        raise _misfit(module, parts)
    kernel: Kernel | None = kernel_of(module)
    if weight.dim() == 4:
        kernel = (weight.shape[2], weight.shape[3])
    return Dense(weight.flatten(1), kernel)


def _full_diff(module: str, parts: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
    return floats["diff"]


def _loha(module: str, parts: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
    _require_parts(module, parts, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    rank = parts["hada_w1_b"].shape[0]
    alpha = _read_alpha(module, parts)
    first, second = (_low_rank(module, parts, floats, f"hada_w{i}", f"hada_t{i}") for i in "12")
    if first.shape != second.shape:
        raise _misfit(module, parts)
    return first * second * ((rank if alpha is None else alpha) / rank)


def _lokr(module: str, parts: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
    low = [f"lokr_w{i}" for i in "12" if f"lokr_w{i}" not in parts]
    for name in low:
        _require_parts(module, parts, {f"{name}_a", f"{name}_b"})
    w1, w2 = (
        _low_rank(module, parts, floats, name, "lokr_t2" if name == "lokr_w2" else "")
        if name in low
        else floats[name]
        for name in ("lokr_w1", "lokr_w2")
    )
    if w1.numel() * w2.numel() > MAX_ELEMENTS:
        raise _misfit(module, parts)
    alpha = _read_alpha(module, parts)
    scale = alpha / parts[f"{low[-1]}_b"].shape[0] if low and alpha is not None else 1.0
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1.contiguous(), w2.contiguous()) * scale


def _low_rank(
    module: str, parts: dict[str, Tensor], floats: dict[str, Tensor], name: str, core: str
) -> Tensor:
    """a b, or with a core (i, j, k, l), a (i, out), b (j, in): (out, in, k, l)."""
    a, b = floats[f"{name}_a"], floats[f"{name}_b"].flatten(1)
    if core in floats:
        return _multiply(module, parts, "ij...,ip,jr->pr...", floats[core], a, b)
    return _multiply(module, parts, "pi,ir->pr", a.flatten(1), b)


def read_bias(module: str, parts: Mapping[str, Tensor], out: int | None) -> Tensor:
    """The change of a module's bias (out,), fp32.

    Args:
        out: outputs of the module's own matrix; None where only its bias changes.
    Raises:
        FileFormatError: no vector of floats, or one of another length than the matrix.
    """
    change = parts["diff_b"]
    if change.dim() != 1 or not change.numel() or not change.dtype.is_floating_point:
        raise FileFormatError(
            f"diff_b of {module} is {tuple(change.shape)} of {change.dtype}; wanted one float for "
            "each output."
        )
    if out is not None and len(change) != out:
        raise FileFormatError(
            f"diff_b of {module} changes {counted(len(change), 'output')}, its weights have {out}; "
            "the file does not fit together."
        )
    return change.to(torch.float32, copy=True)


def refuse_norm(module: str, parts: Mapping[str, Tensor]) -> None:
    """Raises FileFormatError for a change of a norm, which is no matrix."""
    if _NORM.search(module):
        raise FileFormatError(
            f"{module} is a norm ({', '.join(sorted(parts))}); of a full file the changes of "
            "linear layers and convolutions are read. Save it without norms, or fuse it into a "
            "checkpoint with the tool that made it."
        )


def _require_parts(module: str, parts: Mapping[str, Tensor], names: set[str]) -> None:
    missing = sorted(names - set(parts))
    if missing:
        raise FileFormatError(f"{module} lacks {', '.join(missing)}; the file is incomplete.")


@dataclass(frozen=True)
class Algorithm:
    """A kind of adapter whose update is a matrix: how it is known, and how it is formed."""

    beginning: str  # of one of its parts at least
    parts: tuple[str, ...]  # beside alpha and scalar
    build: Callable[[str, dict[str, Tensor], dict[str, Tensor]], Tensor]
    is_scaled: bool = True  # by alpha / rank, which a configuration may hold instead of a tensor


KINDS = (
    Algorithm("diff", ("diff",), _full_diff, is_scaled=False),
    Algorithm(
        "hada",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        _loha,
    ),
    Algorithm(
        "lokr",
        (
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ),
        _lokr,
    ),
)
PLAIN_PARTS = (  # of LyCORIS and kohya, named as their keys end
    *("alpha", "dora_scale", "diff_b", "scalar"),
    *(part for kind in KINDS for part in kind.parts),
)
_NORM = re.compile(r"(\.|_)norm\d?$|\.conv_norm_out$")  # names of SDXL's norms
UNREAD = {  # kinds of SDXL's adapters that nothing here forms, by the ends of their keys
    "IA3": re.compile(r"\.(on_input|ia3_l(\.weight)?)$|^lora_\w+\.weight$"),
    "OFT or BOFT": re.compile(r"\.(oft_\w+|boft_\w+)(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12](\.weight)?$"),
    "a change of norms": re.compile(r"\.[wb]_norm$"),
}


def unread_kind_of(key: str) -> str | None:
    """The kind of SDXL adapter that a key belongs to, of those that are known and not read."""
    return next((kind for kind, pattern in UNREAD.items() if pattern.search(key)), None)
