"""What a bug report needs, to be pasted into it: machine, versions, a run's facts.

Of run.json only what is listed here is told. No prompt, caption, task's name, key or path is in it;
what an option names as a path is a number (`anonymous`).
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcp_plugin.config.logs import SECRETS
from lcp_plugin.doctor.anonymous import Anonymiser
from lcp_plugin.doctor.machine import examine
from lcp_plugin.errors import ConfigError
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.run.record import versions
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.telling.wording import counted

_PLAIN = re.compile(r"[A-Za-z0-9_.:=,+-]{1,60}")  # an option's value that is no one's words
_PATHS = re.compile(r"_(dir|file|path|root|weights)$|^(prev|resume|vae|in_json|sample_prompts)$")
_PATHS_TOO = ("pretrained_model_name_or_path", "config", "dataset_config", "log_tracker_config")
_WORDS = re.compile(r"^(metadata|caption|wandb|log|huggingface)_|comment|prompt|output_name|token")
_BASES = ("tiny-sdxl", "stabilityai/stable-diffusion-xl-base-1.0")  # names that tell no one
_OF_TASK = ("index", "kind", "images", "steps", "rank", "alpha")
_OF_RUN = ("format", "status", "seed", "order_seed", "strategy", "versions", "ended", "sessions")
LAST_STEPS = 3


def describe_for_issue(run: Path | None, output_dir: Path, rank: int) -> str:
    """Markdown for an issue: this machine, its versions and, where one is named, a run.

    Args:
        run: a run's folder (the one that holds run.json).
    Raises:
        ConfigError: the folder holds no run.json that can be read.
    """
    facts = read_facts(run) if run is not None else {}
    anonymous = Anonymiser()
    lines = ["### Machine", "", "```text", f"system      {_name_system()}"]
    lines += [f"{c.what:<11} {c.found}" for c in examine(output_dir, rank)]
    lines += ["```", "", "### Versions", "", "```text"]
    lines += [f"{name:<13} {version}" for name, version in versions().items()]
    lines.append("```")
    if run is not None:
        told = describe_run(facts, anonymous) | {"last_steps": read_last_steps(run)}
        lines += ["", "### Run", "", "```json", json.dumps(told, indent=2, ensure_ascii=False)]
        lines.append("```")
    return anonymous.text("\n".join(lines))


def read_facts(run: Path) -> dict[str, Any]:
    """A run's run.json. Raises ConfigError."""
    if not (run / "run.json").is_file():
        raise ConfigError(
            f"--report {run}: holds no run.json; give a run's folder, <output_dir>/<output_name>."
        )
    return RunStore(run.parent, run.name).read_run() or {}


def words_of(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run's user has named: (word, what it is)."""
    yield str(facts.get("name") or ""), "run"
    for record in facts.get("tasks") or ():
        for key, value in record.items():
            texts = value if isinstance(value, list) else [value]
            if key not in _OF_TASK:
                yield from ((text, f"task's {key}") for text in texts if isinstance(text, str))


def describe_run(facts: Mapping[str, Any], anonymous: Anonymiser) -> dict[str, Any]:
    """What is told of a run.json."""
    told = {key: facts[key] for key in _OF_RUN if key in facts}
    told["options"] = {
        key: _tell_option(key, value, anonymous)
        for key, value in (facts.get("options") or {}).items()
        if key not in SECRETS
    }
    told["tasks"] = [
        {key: record[key] for key in _OF_TASK if key in record}
        for record in facts.get("tasks") or ()
    ]
    told["base_hash"] = (facts.get("base") or {}).get("hash")
    told["chained"] = bool((facts.get("parent") or {}).get("source"))
    words = list(words_of(facts))
    told["said"] = [anonymous.text(str(line), words) for line in facts.get("said") or ()]
    return told


def _tell_option(key: str, value: Any, anonymous: Anonymiser) -> Any:
    """Numbers, switches and our own words as they are; a path by its number, other text not."""
    if isinstance(value, list):
        return [_tell_option(key, one, anonymous) for one in value]
    if not isinstance(value, str) or value in _BASES:
        return value
    if _PATHS.search(key) or key in _PATHS_TOO:
        return anonymous.path(value)
    if _WORDS.search(key) or not _PLAIN.fullmatch(value):
        return f"<{counted(len(value), 'character')}>"
    return value


def read_last_steps(run: Path) -> list[Mapping[str, Any]]:
    """The numbers of a run's last steps; none where it has logged none."""
    file = run / "logs" / "steps.jsonl"
    steps = read_steps(file)[-LAST_STEPS:] if file.is_file() else []
    return [{k: v for k, v in step.items() if isinstance(v, int | float)} for step in steps]


def _name_system() -> str:
    """Linux 6.1 x86_64: the system, without the machine's name."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"
