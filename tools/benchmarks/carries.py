"""What crosses a boundary, on synthetic tasks of every strategy: what rounding takes, what disks
hold. Trained factors are drawn: B ~ N(0, .001^2), so that updates are those of a young task.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.boundaries import Matrices, matrices_of
from benchmarks.measure import MB, Row, peak_mb
from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.hooks import Carry, Strategy, TaskStart
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task

STRATEGIES = ("naive", "merge_init", "merge_ortho_init", "magmax")
ROUNDING_BAR, DISK_BAR = 0.01, 1.01  # of ||D||; headers and lineage are the hundredth
BASE_STD, UP_STD, TASKS = 0.03, 1e-3, 10
SHARES = {"sdxl": 16, "topo": 1, "tiny": 1}  # one matrix in so many


@dataclass(frozen=True)
class Learner:
    """A strategy and tasks that need no model."""

    strategy: Strategy
    matrices: Matrices

    def spec(self, index: int) -> AdapterSpec:
        """A fresh adapter of all matrices."""
        shapes = dict(zip(self.matrices.names(), self.matrices.shapes, strict=True))
        return AdapterSpec(shapes, self.matrices.rank, float(self.matrices.rank), index)

    def learn(self, index: int, carry: Carry) -> tuple[Task, Adapter, Carry]:
        """A task, its trained adapter, and the carry behind it."""
        task = Task(index, f"task{index}", "object", f"sks thing {index}", (), "")
        start: TaskStart = self.strategy.begin_task(task, carry, self.spec(index))
        generator = torch.Generator().manual_seed(index)
        trained = Adapter(
            {
                name: Factors(
                    f.down,
                    f.up + torch.randn(f.up.shape, generator=generator) * UP_STD,
                    f.alpha,
                )
                for name, f in start.adapter.items()
            }
        )
        return task, trained, self.strategy.end_task(task, carry, trained)


def measure_rounding(size: str, tasks: int = 3) -> list[Row]:
    """Rows: for each strategy what a bf16 base loses of its carry under --carry_as auto."""
    matrices = _sample(size)
    model = AdaptedUNet({"unet": build_model(matrices, torch.bfloat16)})
    rows = []
    for name in STRATEGIES:
        carry, learner = Carry(), Learner(create_strategy(name, ()), matrices)
        for index in range(1, tasks + 1):
            carry = learner.learn(index, carry)[2]
        shares = model.set_base(carry.total)
        auto, noise = (shares[key] for key in ("missing_share", "noise_share"))
        note = f"baseline: D itself; stochastic rounding's noise is {noise:.2%} of ||W||"
        label = f"rounding of {name}'s carry, bf16 base, auto, {matrices.label}"
        rows.append(Row(label, auto, 1.0, "||D||", peak_mb(), ROUNDING_BAR, note))
    return rows


def measure_disk(size: str, tasks: int = TASKS) -> list[Row]:
    """Row: bytes of a ten-task run's folder against its last carry and ten adapters."""
    matrices = _sample(size)
    learner, carry = Learner(create_strategy("merge_init", ()), matrices), Carry()
    with tempfile.TemporaryDirectory() as name:
        store = RunStore(Path(name), "bench")
        facts = {"strategy": {"name": "merge_init", "args": []}, "base": {"name": "", "hash": ""}}
        for index in range(1, tasks + 1):
            task, trained, carry = learner.learn(index, carry)
            store.save_task(task, trained, carry, learner.strategy, facts, "last")
        held = sum(f.stat().st_size for f in store.root.rglob("*") if f.is_file())
    adapter = sum(f.down.numel() + f.up.numel() for f in trained.values()) * 4
    wanted = carry.total.nbytes() + tasks * adapter
    note = "--keep_carries last, fp32; the last carry and an adapter for each task"
    label = f"disk of a run of {tasks} tasks, {matrices.label}"
    return [Row(label, held / 1e6, wanted / 1e6, MB, peak_mb(), DISK_BAR, note)]


def _sample(size: str) -> Matrices:
    matrices = matrices_of(size)
    parts = SHARES[size]
    return Matrices(size, matrices.shapes[::parts], matrices.parts * parts)


def build_model(matrices: Matrices, dtype: torch.dtype) -> nn.Module:
    """Frozen linear layers of the shapes under their modules' names."""
    root, generator = nn.Module(), torch.Generator().manual_seed(0)
    for name, (out, inputs) in zip(matrices.names(), matrices.shapes, strict=True):
        *path, last = name.removeprefix("unet.").split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(inputs, out, bias=False, dtype=dtype).requires_grad_(False)
        layer.weight.copy_(torch.randn(out, inputs, generator=generator) * BASE_STD)
        parent.add_module(last, layer)
    return root
