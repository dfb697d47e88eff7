"""`lcp doctor --report`: what an issue needs, and nothing of who wrote it or what was learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from told import assert_one_error

from lcp_plugin.commands.doctor import main
from lcp_plugin.doctor import anonymous, issue_report
from lcp_plugin.doctor.anonymous import Anonymiser

USER, HOST = "annalena", "annas-laptop"
PRIVATE = (USER, HOST, "/home", "C:\\", "Zoe", "Smith", "secret", "hf_", "ohwx", "kitchen")


@pytest.fixture(autouse=True)
def _of_anna(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine and a user whose names no other text has."""
    monkeypatch.setattr(anonymous.platform, "node", lambda: f"{HOST}.example.org")
    monkeypatch.setattr(anonymous.getpass, "getuser", lambda: USER)
    monkeypatch.setattr(issue_report, "examine", lambda *_: [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as its user has named things."""
    home = f"/home/{USER}/Zoe Smith"
    facts: dict[str, Any] = {
        "format": 1, "status": "running", "seed": 7, "name": "Zoe", "ended": [1],
        "strategy": {"name": "recall", "args": ["of=naive"]},
        "versions": {"torch": "2.13.0"},
        "base": {"name": f"{home}/sdxl.safetensors", "hash": "ab" * 32},
        "parent": {"source": f"{home}/old.safetensors", "hash": "cd" * 32},
        "images": {"Zoe": [f"{home}/photos"]},
        "fingerprint": {"tasks": ["ohwx Zoe Smith"]},
        "tasks": [{
            "index": 1, "name": "Zoe", "kind": "object", "concept": "ohwx person", "images": 4,
            "prompts": ["ohwx person in the kitchen"], "train_prompt": "a photo of ohwx person",
        }],
        "options": {
            "learning_rate": 1e-4, "optimizer_type": "AdamW8bit", "network_args": ["conv_dim=4"],
            "pretrained_model_name_or_path": f"{home}/sdxl.safetensors",
            "output_dir": f"C:\\Users\\{USER}\\out", "output_name": "Zoe", "prev": "secret/old",
            "sample_prompts": "secret.txt", "caption_prefix": "ohwx",
            "base_weights": [f"{home}/a.pt"], "prev_prompts": ["a photo of Zoe"],
            "metadata_author": "Smith", "huggingface_token": "hf_x",
        },
        "said": [
            f"task 'Zoe': 2 images of '{home}/photos' are small",
            f"C:\\Users\\{USER}\\out on {HOST.upper()} is nearly full; ~/secret too",
        ],
    }  # fmt: skip
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "logs").mkdir()
    step = {"event": "step", "task_index": 1, "task": "Zoe", "step": 2, "loss": 0.25}
    (folder / "logs" / "steps.jsonl").write_text(json.dumps(step) + "\n", encoding="utf-8")
    return folder


def test_nothing_tells_who_and_where_and_what_was_learned(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--report", str(run), "--output_dir", str(run.parent)]) == 0
    printed = capsys.readouterr().out
    assert not [word for word in PRIVATE if word.lower() in printed.lower()]
    assert str(run.parent) not in printed


def test_what_a_maintainer_needs_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--report", str(run)])
    printed = capsys.readouterr().out
    found = re.search(r"### Run\n\n```json\n(.*?)\n```", printed, re.DOTALL)
    assert found is not None
    told = json.loads(found[1])
    assert told["options"]["learning_rate"] == 1e-4
    assert told["options"]["optimizer_type"] == "AdamW8bit"
    assert told["options"]["network_args"] == ["conv_dim=4"]
    assert told["options"]["pretrained_model_name_or_path"] == "<path 1>.safetensors"
    assert told["options"]["base_weights"] == ["<path 5>.pt"]
    assert told["strategy"] == {"name": "recall", "args": ["of=naive"]}
    assert told["tasks"] == [{"index": 1, "kind": "object", "images": 4}]
    assert told["base_hash"] == "ab" * 32
    assert told["chained"]
    assert told["said"][0].startswith("task '<run>': 2 images of '<path")
    assert told["last_steps"][0]["loss"] == 0.25
    assert "### Machine" in printed
    assert "### Versions" in printed


def test_one_path_has_one_number() -> None:
    told = Anonymiser().text(
        '"/data/a b.toml" and /data/x/y, D:/z.png; /data/x/y again, 1/2 http://h'
    )
    assert told == '"<path 1>.toml" and <path 2>, <path 3>.png; <path 2> again, 1/2 http://h'


def test_a_real_run_is_reported_without_its_folders(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = train("mine", tasks=(0,), max_train_steps=1).store.root
    capsys.readouterr()
    assert main(["--report", str(root)]) == 0
    printed = capsys.readouterr().out
    assert '"status": "finished"' in printed
    assert '"loss":' in printed
    for private in (str(root.parents[1]), "disc", "sks0"):
        assert private not in printed


def test_a_folder_without_a_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --report {tmp_path}: holds no run.json; give a run's folder")
    assert_one_error(told)
