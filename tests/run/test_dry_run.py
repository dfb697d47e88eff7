"""The plan of a dry run: tasks in the order in which they will be learned, no torch model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lcp_plugin.config.load import load_config
from lcp_plugin.errors import DataError
from lcp_plugin.run.dry_run import describe_run


def test_tasks_stand_in_the_shuffled_order(write_config: Callable[..., Path]) -> None:
    path = write_config("plan", tasks=(0, 1, 2, 3), order_seed=5)
    plan = describe_run(load_config(["--config", str(path)]), native=64)
    expected = [f"disc{i}" for i in range(4)]
    random.Random(5).shuffle(expected)
    assert re.findall(r"^  \d\. (\w+) ", plan, re.MULTILINE) == expected
    assert "64x64: 3" in plan
    assert "12 steps in all" in plan


def test_an_unreadable_image_ends_the_plan(
    write_config: Callable[..., Path], pictures: Path
) -> None:
    path = write_config("plan")
    (pictures / "disc0" / "bad.png").write_bytes(b"?")
    with pytest.raises(DataError, match=r"bad\.png"):
        describe_run(load_config(["--config", str(path)]))
