"""What trackers and observers are told: names, settings, and the loss on held-out images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.accelerator
import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from lcp_plugin.errors import LcpError
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.hooks import Observer, RunView
from lcp_plugin.observers.jsonl import read_steps, read_validation
from lcp_plugin.registry import check_plugin
from lcp_plugin.run import trackers
from lcp_plugin.tasks import Task

Train = Callable[..., Any]
HELD_OUT = {"tasks": (0,), "validation_split": 0.4, "validate_every_n_steps": 2}


class FakeTracker(GeneralTracker):  # type: ignore[misc]
    """Stands in for wandb; remembers what it was started with and told."""

    name = "wandb"
    requires_logging_directory = False
    started: dict[str, Any]
    rows: list[tuple[dict[str, Any], int | None]]

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__()
        type(self).started = {"project": run_name, **settings}
        type(self).rows = []

    @property
    def tracker(self) -> None:
        """Nothing to hand out."""
        return None

    def start(self) -> None:
        """Nothing to open."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Remembers the options."""
        type(self).started["config"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Remembers a row."""
        type(self).rows.append((values, step))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """accelerate with FakeTracker in wandb's place; the keys that were logged in with."""
    keys: list[str] = []

    class Module:
        @staticmethod
        def login(key: str) -> None:
            keys.append(key)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    for module in (accelerate.tracking, accelerate.accelerator):
        if hasattr(module, "LOGGER_TYPE_TO_CLASS"):
            monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.WANDB])
    shim = SimpleNamespace(import_module={"wandb": Module}.__getitem__)
    monkeypatch.setattr(trackers, "importlib", shim)
    return keys


def test_names_settings_and_key_reach_the_tracker(
    train: Train, tmp_path: Path, wandb: list[str]
) -> None:
    settings = tmp_path / "tracker.toml"
    settings.write_text('[wandb]\nentity = "me"\ntags = ["discs"]\n')
    train(
        "run",
        tasks=(0,),
        max_train_steps=1,
        log_with="wandb",
        log_tracker_name="my project",
        log_tracker_config=str(settings),
        log_config=True,
        wandb_run_name="third try",
        wandb_api_key="secret",
    )
    started = FakeTracker.started
    config = started.pop("config")
    assert started == {
        "project": "my project",
        "entity": "me",
        "tags": ["discs"],
        "name": "third try",
    }
    assert config["network_dim"] == 2
    assert "secret" not in json.dumps(config)
    assert wandb == ["secret"]


def test_the_axis_of_a_run_goes_on_where_tasks_are_appended(train: Train, wandb: list[str]) -> None:
    for tasks in ((0,), (0, 1)):
        train("run", tasks=tasks, max_train_steps=2, log_with="wandb")
    assert [s for values, s in FakeTracker.rows if "loss/current" in values] == [3, 4]


def test_unset_names_have_defaults_and_nothing_is_logged_in(train: Train, wandb: list[str]) -> None:
    train("run", tasks=(0,), max_train_steps=1, log_with="wandb")
    assert FakeTracker.started == {"project": "continual_sdxl"}
    assert wandb == []


def test_a_settings_file_that_is_not_there_is_one_line(train: Train, wandb: list[str]) -> None:
    with pytest.raises(LcpError, match=r"nope\.toml"):
        train("run", tasks=(0,), log_with="wandb", log_tracker_config="nope.toml")


def test_trackers_put_validation_on_the_axis_that_runs_through_all_tasks(
    train: Train, wandb: list[str]
) -> None:
    train("run", **{**HELD_OUT, "tasks": (0, 1)}, max_train_steps=4, log_with="wandb")
    found = [
        (name, step)
        for values, step in FakeTracker.rows
        for name in values
        if name.startswith("loss/validation/")
    ]
    assert found == [
        ("loss/validation/disc0", 2),
        ("loss/validation/disc0", 4),
        ("loss/validation/disc1", 6),
        ("loss/validation/disc1", 8),
    ]


# ------------------------------------------------------------------------- the hook of observers


class Watcher(Observer):
    """Writes down the validation losses it is told."""

    name = "watcher"

    def on_run_begin(self, run: RunView) -> None:
        """Remembers the folder."""
        self.path = Path(run.output_dir) / "watched.json"
        self.told: list[Any] = []

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> None:
        """Notes one."""
        self.told.append([task.name, step, loss])
        self.path.write_text(json.dumps(self.told))


class Answering(Observer):
    """Breaks the rule that observers only look."""

    name = "answering"

    def on_validation(self, run: RunView, task: Task, step: int, loss: float) -> Any:
        """Returns what it was told."""
        return loss


def test_every_observer_is_told_the_validation_loss(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("run", **HELD_OUT, max_train_steps=4, observer=[f"{__name__}:Watcher"])
    facts = run.store.folders()[0].lineage["training"]["validation"]
    assert [step for step, _ in facts] == [2, 4]
    told = json.loads((run.store.root / "watched.json").read_text())
    assert told == [["disc0", *fact] for fact in facts]
    log = run.store.root / "logs" / "steps.jsonl"
    assert [[line["step"], line["loss"]] for line in read_validation(log)] == facts
    assert len(read_steps(log)) == 4, "steps and validation are told apart"
    shown = capsys.readouterr().err
    assert f"task 1 of 1 disc0: step 4, validation loss {facts[1][1]:.4f}" in shown


def test_an_observer_that_answers_is_refused(train: Train) -> None:
    with pytest.raises(LcpError, match="on_validation returned a value"):
        train("run", **HELD_OUT, max_train_steps=2, observer=[f"{__name__}:Answering"])


def test_a_hook_of_another_signature_is_refused_when_it_is_loaded() -> None:
    class Wrong(Observer):
        """Lacks the loss."""

        name = "wrong"

        def on_validation(self, run: RunView, task: Task) -> None:  # type: ignore[override]
            """Never called."""

    with pytest.raises(LcpError, match="on_validation"):
        check_plugin(Observer, Wrong)


# ------------------------------------------------------------------------------- the file's size


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, "32x32"), ({"resolution": "40,24"}, "40x24")],
    ids=["the base's own", "given"],
)
def test_the_header_names_the_size_that_was_trained_at(
    train: Train, given: dict[str, Any], size: str
) -> None:
    run = train("run", tasks=(0,), max_train_steps=1, **given)
    header = read_header(run.store.deliverable).metadata
    assert header["modelspec.resolution"] == size
    assert header["ss_resolution"] == f"({size.replace('x', ', ')})"


def test_the_header_names_the_largest_size_of_the_data_sets(train: Train) -> None:
    sets = [
        {"resolution": side, "subsets": [{"image_dir": "disc0", "class_tokens": "disc"}]}
        for side in (32, 48)
    ]
    task = {"name": "disc0", "concept": "disc", "datasets": sets}
    run = train("run", tasks=[task], max_train_steps=1, resolution="24")
    assert read_header(run.store.deliverable).metadata["modelspec.resolution"] == "48x48"
