"""The plan of a dry run: tasks in the order in which they will be learned, no torch model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcp_plugin.cli import main
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


def test_a_dry_run_refuses_a_name_under_which_other_work_stands(
    train: Callable[..., Any],
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"tasks": (0,), "max_train_steps": 1}
    run = train("run", **given)

    def plan(*flags: str, **more: Any) -> int:
        return main(["--config", str(write_config("run", **given, **more)), "--dry_run", *flags])

    assert plan() == 0
    assert plan(learning_rate=1e-3) == 1
    assert "was started with other settings: learning_rate" in capsys.readouterr().err
    assert plan("--overwrite", learning_rate=1e-3) == 0
    assert plan("--output_name", "other", learning_rate=1e-3) == 0
    assert run.store.deliverable.is_file()
    (run.store.root / "run.json").unlink()
    assert plan() == 1
    assert "exists already; choose another --output_name" in capsys.readouterr().err


def test_an_unreadable_image_ends_the_plan(
    write_config: Callable[..., Path], pictures: Path
) -> None:
    path = write_config("plan")
    (pictures / "disc0" / "bad.png").write_bytes(b"?")
    with pytest.raises(DataError, match=r"bad\.png"):
        describe_run(load_config(["--config", str(path)]))
