"""A carry as tensors, and as the one LoRA that is delivered: its factors and what its header says.

On disk a carry is one file, delta and adapter factors under distinct prefixes. As a deliverable it
is a LoRA of all its modules; `blocks` in the header say which ranks were stacked in each, so that
the same carry, block by block, comes back from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread

from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import biases_from_tensors, biases_to_tensors
from lcp_plugin.delta import (
    Delta,
    Entry,
    Stacked,
    adapter_from_tensors,
    adapter_to_tensors,
    delta_from_tensors,
    delta_to_tensors,
)
from lcp_plugin.formats.identity import hash_tensors
from lcp_plugin.formats.lineage import Lineage, collect_blocks
from lcp_plugin.hooks import Carry
from lcp_plugin.tasks import TaskRecord

_HASH = "_hash"  # where a carry keeps its own


def carry_to_tensors(carry: Carry) -> dict[str, Tensor]:
    """Delta, adapter factors and changes of biases under distinct prefixes."""
    return {
        **delta_to_tensors(carry.delta, "delta/"),
        **(adapter_to_tensors(carry.adapter, "adapter/") if carry.adapter is not None else {}),
        **biases_to_tensors(carry.biases, "bias/"),
    }


def carry_from_tensors(tensors: Mapping[str, Tensor], tasks: Sequence[TaskRecord]) -> Carry:
    """The carry of such tensors; the records come from lineage.json."""
    adapter = adapter_from_tensors(tensors, "adapter/")
    delta, biases = delta_from_tensors(tensors, "delta/"), biases_from_tensors(tensors, "bias/")
    return Carry(delta, adapter or None, tuple(tasks), biases)


def hash_carry(carry: Carry) -> str:
    """sha256 of the carry's tensors, which never change: taken once of each value."""
    known = vars(carry)
    if _HASH not in known:
        known[_HASH] = hash_tensors(carry_to_tensors(carry))
    return str(known[_HASH])


@contextmanager
def hashing(carry: Carry) -> Iterator[None]:
    """Takes the hash on a thread of its own meanwhile: a dense carry of SDXL's takes seconds."""
    thread = Thread(target=hash_carry, args=(carry,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def deliverable_adapter(carry: Carry) -> Adapter:
    """The carry as one exact LoRA: factors that go on as they are, deltas at their true rank."""
    going_on = carry.adapter or Adapter()
    alone = going_on.without(carry.delta)
    rest = carry.total.restrict(set(carry.total) - set(alone))
    return Adapter({**rest.as_adapter(), **alone})


def lineage_of(
    carry: Carry, strategy: str, strategy_args: Sequence[str], base_name: str, base_hash: str
) -> Lineage:
    """What a deliverable's header says of the carry that it holds."""
    going_on = carry.adapter is not None and not carry.delta
    stacked = {n: e.blocks for n, e in carry.total.items() if isinstance(e, Stacked)}
    return Lineage(
        tasks=carry.tasks,
        strategy=strategy,
        strategy_args=tuple(strategy_args),
        base=base_name,
        base_hash=base_hash,
        carry="adapter" if going_on else "delta",
        carry_hash=hash_carry(carry),
        blocks=collect_blocks(stacked),
    )


def restore_blocks(delta: Delta, lineage: Lineage) -> Delta:
    """The delta of a deliverable with the blocks that were stacked in it, as the header says."""
    entries: dict[str, Entry] = dict(delta)
    for name, entry in delta.items():
        wanted = lineage.blocks_of(name)
        if isinstance(entry, Stacked) and sum(wanted) == entry.rank:
            entries[name] = Stacked(entry.up, entry.down, wanted, entry.kernel)
    return Delta(entries)
