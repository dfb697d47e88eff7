"""Options end at the builders: what draws noise or measures a loss takes a value of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lcp_plugin"
BUILDERS = {  # module -> its functions that take the run's options
    "data/captions": (),
    "data/dataset": ("of",),
    "data/encodings": ("of",),
    "data/examples": (),
    "sdxl/loss": ("of",),
    "sdxl/noise": ("of",),
    "sdxl/precision": ("of", "choose_attention"),
    "sdxl/samplers": (),
    "sdxl/targets": ("of",),
    "training/optimizers": ("of",),
    "training/schedules": ("of",),
    "training/validation": (),
}


@pytest.mark.parametrize("module", BUILDERS)
def test_only_builders_take_the_options(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    takers = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(a.annotation and "Options" in ast.unparse(a.annotation) for a in node.args.args)
    }
    assert takers == set(BUILDERS[module])
