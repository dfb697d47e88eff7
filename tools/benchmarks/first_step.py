"""An observer that ends a run behind its first step: `--observer benchmarks.first_step:...`.

It prints the CPU seconds of the process since its start, and which large packages it has imported.
"""

from __future__ import annotations

import json
import os
import sys
import time

from benchmarks.measure import peak_mb
from lcp_plugin.hooks import Observer, RunView, StepReport

LARGE = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "numpy",
    "scipy",
    "PIL",
    "matplotlib",
    "pandas",
    "sklearn",
    "onnxruntime",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed",
    "sympy",
)


class FirstStep(Observer):
    """Prints the cost so far at the end of step 1 and leaves at once."""

    name = "first_step"

    def on_step_end(self, run: RunView, step: StepReport) -> None:
        """Nothing is cleaned up: what follows is no part of the start."""
        found = {name: name in sys.modules for name in LARGE}
        facts = {"cpu": time.process_time(), "ended": time.time(), "imported": found}
        print("\n" + json.dumps({**facts, "peak_mb": peak_mb()}), flush=True)
        os._exit(0)
