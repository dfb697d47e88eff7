"""What the checks on a card share: runs of the embedded base, their losses and files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Train = Callable[..., Any]
DEVICE = os.environ.get("LCP_TEST_DEVICE", "cuda")
EMBEDDED: Mapping[str, Any] = {
    "pretrained_model_name_or_path": "tiny-sdxl",
    "resolution": 48,
    "network_dim": 4,
    "network_alpha": 4,
    "learning_rate": 1e-3,
    "max_train_steps": 4,
}


@contextmanager
def training_on(device: str) -> Iterator[None]:
    """accelerate takes this device for all that is trained meanwhile."""
    from accelerate.state import AcceleratorState

    before = os.environ.get("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if before is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = before


def train_on(device: str, train: Train, name: str, tasks: Any = (0,), **options: Any) -> Any:
    """A finished run of the embedded base on the device."""
    with training_on(device):
        run = train(name, tasks=tasks, **{**EMBEDDED, **options})
    assert run.device.split(":")[0] == device.split(":")[0]
    return run


def read_losses(run: Any) -> list[float]:
    """Of every step of all tasks, in order."""
    lines = (run.store.root / "logs" / "steps.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["event"] == "step"]


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors; 0 only if they are equal to the bit."""
    assert a.keys() == b.keys()
    if all(torch.equal(a[key], b[key]) for key in a):
        return 0.0
    lost = sum(float((a[key].double() - b[key].double()).square().sum()) for key in a)
    whole = sum(float(b[key].double().square().sum()) for key in b)
    return float((lost / whole) ** 0.5)


def state_fact(name: str, value: Any) -> None:
    """A measured fact for the record: printed, and a line of JSON in LCP_GPU_FACTS."""
    print(f"fact: {name}: {value}", file=sys.stderr)
    path = os.environ.get("LCP_GPU_FACTS")
    if path:
        device = torch.cuda.get_device_name() if DEVICE.startswith("cuda") else DEVICE
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"fact": name, "value": value, "device": device}) + "\n")
