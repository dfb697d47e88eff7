"""How a model is asked: prompts per concept, images per prompt, steps, guidance, seed.

A protocol is a TOML file: `images`, `steps`, `guidance`, `seed`, and perhaps `[prompts]` with lists
for `object`, `style` and `live` (templates with {concept}); without them every task's own prompts
are used. The DreamBooth data set brings its own list (arXiv 2208.12242: 25 prompts, 4 images each);
`read_dreambooth_prompts` reads it from prompts_and_classes.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from lcp_plugin.config.convert import Unfit, convert
from lcp_plugin.config.tables import read_table
from lcp_plugin.errors import ConfigError, ScoringError
from lcp_plugin.evaluation.chains import EvalTask
from lcp_plugin.evaluation.pictures import Sampling
from lcp_plugin.tasks import fill_prompt

LIVE = frozenset({"dog", "cat"})  # DreamBooth's live subjects


@dataclass(frozen=True)
class Protocol:
    """Sampling and, where the tasks' own prompts are not meant, prompt templates per kind."""

    sampling: Sampling = field(default_factory=Sampling)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    count: int | None = None  # prompts per task; None: all

    def apply(self, task: EvalTask) -> EvalTask:
        """The task with the prompts of this protocol."""
        kind = "live" if task.class_words in LIVE and "live" in self.prompts else task.kind
        templates = self.prompts.get(kind)
        prompts = task.prompts
        if templates:
            prompts = tuple(fill_prompt(t, task.concept, task.class_words) for t in templates)
        if not prompts:
            raise ConfigError(f"task {task.name} has no evaluation prompts; set eval_prompts.")
        return replace(task, prompts=prompts[: self.count] if self.count else prompts)


def read_protocol(
    path: Path,
    overrides: Mapping[str, Any],
    prompt_list: Mapping[str, Sequence[str]] | None = None,
) -> Protocol:
    """A protocol file; `overrides` (of Sampling's fields and `count`) beat it where not None, and a
    `prompt_list` that was read already beats the one that the file names.

    Raises:
        ConfigError: unreadable, or with keys that no protocol has.
    """
    try:
        table = read_table(path)
    except ConfigError as error:
        raise ConfigError(f"protocol {path} cannot be read: {error}") from error
    prompts = table.pop("prompts", {})
    if not isinstance(prompts, dict):
        raise ConfigError(f"protocol {path}: prompts: wanted a table of lists, [prompts].")
    listed = table.pop("prompt_list", None)
    known = {f.name for f in fields(Sampling)}
    unknown = [*(table.keys() - known), *(prompts.keys() - {"object", "style", "live"})]
    if unknown:
        raise ConfigError(f"protocol {path}: unknown {', '.join(sorted(unknown))}.")
    if prompt_list:
        prompts = prompt_list
    elif listed:
        prompts = read_dreambooth_prompts(_resolve(path, str(listed)))
    return override(Protocol(_read_sampling(path, table), prompts), overrides)


def _read_sampling(path: Path, table: Mapping[str, Any]) -> Sampling:
    """How images are drawn by a protocol's keys. Raises ConfigError for values that do not fit."""
    hints, values = get_type_hints(Sampling), dict[str, Any]()
    for key, value in table.items():
        try:
            values[key] = convert(value, hints[key])
        except Unfit as error:
            raise ConfigError(f"protocol {path}: {key} = {value!r}: {error}.") from None
    try:
        return Sampling(**values)
    except ConfigError as error:
        raise ConfigError(f"protocol {path}: {error}") from None


def override(protocol: Protocol, overrides: Mapping[str, Any]) -> Protocol:
    """The protocol with what was set on the command line."""
    given = {k: v for k, v in overrides.items() if v is not None}
    count = given.pop("count", protocol.count)
    return replace(protocol, sampling=replace(protocol.sampling, **given), count=count)


def _resolve(protocol: Path, listed: str) -> Path:
    """Relative to the working folder or to the protocol file."""
    for folder in (Path("."), protocol.parent):
        if (folder / listed).is_file():
            return folder / listed
    raise ScoringError(
        f"protocol {protocol.name} wants the data set's {listed}; put it there, or set its path "
        "with --prompt_list."
    )


def read_dreambooth_prompts(path: Path) -> dict[str, tuple[str, ...]]:
    """prompts_and_classes.txt -> templates for `object` and `live`.

    Raises:
        DataError: missing, or without the two lists.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ScoringError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise ScoringError(f"{path} cannot be read: {error}") from error
    _, _, objects = text.partition("Object Prompts")
    objects, _, live = objects.partition("Live Subject Prompts")
    found = {"object": _templates(objects), "live": _templates(live)}
    if not all(found.values()):
        raise ScoringError(
            f"{path} holds no prompt lists; wanted DreamBooth's prompts_and_classes.txt."
        )
    return found


def _templates(section: str) -> tuple[str, ...]:
    quoted = re.findall(r"'([^'\n]*\{0\} \{1\}[^'\n]*)'", section)
    return tuple(template.replace("{0} {1}", "{concept}") for template in quoted)
