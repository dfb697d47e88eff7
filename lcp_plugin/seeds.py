"""All randomness is derived, never consumed: a seed for every (seed, purpose, indices).

So a killed run that starts again, a chained run and any number of data workers draw the same.
"""

from __future__ import annotations

import hashlib

LARGEST_SEED = 2**63 - 1  # that torch.Generator takes as it is


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, e.g. `derive_seed(seed, "noise", task.index, step, micro)`."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
