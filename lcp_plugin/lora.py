"""The mathematics of one LoRA-adapted matrix, on plain tensors.

W = W_0 + D, D = scale * B A, scale = alpha / rank; W_0 (out, in), A (rank, in), B (out, rank).

* starts of A: peft's Gaussian N(0, (1/rank)^2) (`gaussian`, the authors' code), N(0, 1) (`unit`,
  the poster of arXiv 2410.04891), kaiming_uniform(a=sqrt 5) (`kaiming`, kohya's networks.lora);
  B starts at 0.
* orthogonal start, merge & orthogonal init of arXiv 2410.04891: column i of the new A is a unit
  vector orthogonal to column i of the accumulated A. Closed form of the last right singular vector
  of the 1 x rank matrix, see `orthogonal_columns`. The authors run one SVD per column; this is the
  same vector, sign included.
* selection by magnitude, MagMax (arXiv 2407.06322, eq. 3): of two updates the larger, by entries.
* truncation to a rank without forming the matrix: QR of both factors, SVD of the small core;
  optimal in Frobenius norm (Eckart-Young), error relative to ||D||_F.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcp_plugin.errors import StrategyError
from lcp_plugin.telling.wording import counted

INITS = ("gaussian", "unit", "kaiming")


def check_init(init: str) -> str:
    """`init` itself if it is known, else a StrategyError."""
    if init not in INITS:
        raise StrategyError(f"init = '{init}' is not known; use one of {', '.join(INITS)}.")
    return init


def draw_down(shape: tuple[int, int], init: str, generator: torch.Generator | None) -> Tensor:
    """A fresh A.

    Args:
        shape: (rank, in).
        init: one of `INITS`.
        generator: CPU generator; None uses torch's global one.
    Raises:
        StrategyError: `init` is not known.
    """
    rank, inputs = shape
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / rank  # (rank, in)
    if init == "unit":
        return torch.randn(shape, generator=generator)
    check_init(init)
    bound = 1 / math.sqrt(inputs)  # kaiming_uniform, a = sqrt(5): gain sqrt(1/3), std gain/sqrt(in)
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def compute_update(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """scale * B A   # (out, rank) x (rank, in) -> (out, in), fp32 or the factors' own fp64."""
    if up.dtype is not torch.float64:
        up, down = up.float(), down.float()
    return (up * scale) @ down  # the scale goes into B only


def orthogonal_columns(previous: Tensor) -> Tensor:
    """A matrix whose column i is a unit vector orthogonal to column i of `previous`.

    With n = ||v||, s = -1 if v_1 carries a sign bit else +1, den = n (n + |v_1|):
    w = e_r - (v_r / den) (v + s n e_1), and w = e_r where v = 0: the last row of LAPACK's
    Householder reflector,
    equal to `torch.linalg.svd(v.view(1, -1)).Vh[-1]` sign included (arXiv 2410.04891, merge &
    orthogonal init). A v_1 of -0.0 counts as negative, as in Fortran's SIGN; MKL takes it as +0.

    Args:
        previous: (rank, in), any floating dtype; half precision is computed in fp32.
    Returns:
        (rank, in), fp32 (fp64 for fp64 input).
    Raises:
        StrategyError: rank 1, where no orthogonal vector exists, or a value that is not finite.
    """
    rank = previous.shape[0]
    if rank < 2:
        raise StrategyError(
            "rank 1 has no orthogonal column; use network_dim >= 2 or another strategy."
        )
    v = previous if previous.dtype is torch.float64 else previous.float()
    if not torch.isfinite(v).all():
        raise StrategyError("the accumulated A holds NaN or infinity; its task folder is damaged.")
    biggest = v.abs().amax(
        dim=0
    )  # (in,): columns are scaled to 1 first, so that tiny ones do not underflow
    v = v / torch.where(biggest > 0, biggest, torch.ones_like(biggest))
    norm = v.norm(dim=0)  # (in,)
    sign = torch.where(torch.signbit(v[0]), -1.0, 1.0).to(v.dtype)
    den = norm * (norm + v[0].abs())
    factor = torch.where(
        den > 0, v[-1] / den.clamp_min(torch.finfo(v.dtype).tiny), torch.zeros_like(den)
    )
    result = -factor * v
    result[0] -= factor * sign * norm
    result[-1] += 1.0
    return result


def row_null_rows(
    row_space: Tensor, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, bool]:
    """`rank` orthonormal rows orthogonal to the row space of an update.

    Args:
        row_space: (r, in), factors or a dense update whose rows span the space to avoid.
        rank: rows wanted, at most `in`.
    Returns:
        rows (rank, in) fp32, and whether the null space was wide enough. If it was not, the
        directions with the least
        energy (right singular vectors of the smallest singular values) fill up.
    Raises:
        StrategyError: rank > in.
    """
    inputs = row_space.shape[1]
    if rank > inputs:
        raise StrategyError(
            f"rank {rank} exceeds the {counted(inputs, 'input')} of a layer; lower network_dim."
        )
    space = row_space.double()
    _, values, vh = torch.linalg.svd(space, full_matrices=False)
    noise = max(space.shape) * torch.finfo(row_space.dtype).eps  # a dense update is a rounded one
    used = int((values > noise * values[0]).sum()) if values.numel() else 0
    if inputs - used >= rank:
        basis = vh[:used]  # (used, in)
        rows = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
        for _ in range(2):  # projecting twice removes what rounding left of the first time
            rows = rows - (rows @ basis.T) @ basis
            rows = torch.linalg.qr(rows.T).Q.T
        return rows.float(), True
    vectors = torch.linalg.svd(space, full_matrices=True).Vh
    return vectors[-rank:].flip(0).float(), False


def select_by_magnitude(newest: Tensor, older: Tensor) -> Tensor:
    """Entry by entry the larger update in fp32; ties go to `newest` (MagMax, arXiv 2407.06322)."""
    newest, older = newest.float(), older.float()
    return torch.where(newest.abs() >= older.abs(), newest, older)


def truncate_factors(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of a lower rank, never forming B A.

    QR of B and of A^T, SVD of the small core R_B R_A^T; singular values go into B.

    Args:
        up: (out, R). down: (R, in). rank: wanted rank.
    Returns:
        B (out, rank'), A (rank', in) in fp32 with rank' = min(rank, R, out, in), and ||D - D'||_F /
        ||D||_F (0 for D = 0).
    """
    q_up, r_up = torch.linalg.qr(up.double() if up.dtype is torch.float64 else up.float())
    q_down, r_down = torch.linalg.qr(down.T.to(q_up.dtype))
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    keep = min(rank, s.numel())
    total = float(s.double().square().sum())
    lost = float(s[keep:].double().square().sum())
    new_up = (q_up @ (u[:, :keep] * s[:keep])).contiguous()
    new_down = (vh[:keep] @ q_down.T).contiguous()
    return new_up.float(), new_down.float(), math.sqrt(lost / total) if total > 0 else 0.0


def truncate_dense(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`truncate_factors` of a dense (out, in) matrix, by one SVD."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    keep = min(rank, s.numel())
    total = float(s.double().square().sum())
    lost = float(s[keep:].double().square().sum())
    error = math.sqrt(lost / total) if total > 0 else 0.0
    return (u[:, :keep] * s[:keep]).contiguous(), vh[:keep].contiguous(), error


def top_right_vectors(up: Tensor, down: Tensor, rank: int) -> Tensor:
    """The first `rank` right singular vectors of B A as rows   # (rank, in), zeros from R on."""
    _, a, _ = truncate_factors(up, down, rank)
    rows = torch.nn.functional.normalize(a, dim=1)
    if rows.shape[0] < rank:
        rows = torch.cat([rows, rows.new_zeros(rank - rows.shape[0], rows.shape[1])])
    return rows
