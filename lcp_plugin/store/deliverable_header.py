"""The whole header of a file with learned tasks: one home for whoever writes one.

    make_header       a run: its deliverable, its files between steps, its exports
    complete_header   sd-scripts with our network_module
    merged_header     a merge of files
    copied_header     a file in another form; `derived_header`: and no longer the same model

`formats.header` words the entries that others read, `formats.lineage` ours, and `header_facts`
tells what task folders record; here they are put together. The hashes of the tensors (`sshs_*`)
are added where a file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.config.options import Options
from lcp_plugin.formats.header import (
    HASHES,
    MODELSPEC,
    TRIGGERS,
    ModelSpec,
    kohya_header,
    minimal_header,
    size_header,
    strip_metadata,
    tags_header,
)
from lcp_plugin.formats.identity import OWN_HASH
from lcp_plugin.formats.lineage import Lineage, ParentFile, derived, how_made, mixed
from lcp_plugin.formats.peft_config import DIFFUSERS_METADATA
from lcp_plugin.hooks import Carry
from lcp_plugin.store.carries import lineage_of
from lcp_plugin.store.header_facts import facts_of_run
from lcp_plugin.store.task_folder import TaskFolder

METADATA_OPTIONS = "metadata_"  # options that become modelspec.*


def make_header(
    carry: Carry, adapter: Adapter, folders: Sequence[TaskFolder], title: str
) -> dict[str, str]:
    """The whole header of a run's LoRA; with no_metadata what readers cannot do without.

    `adapter`: what the file will hold.  `folders`: the run's tasks so far, at least one.
    """
    newest = folders[-1].lineage
    strategy, base = newest["strategy"], newest["base"]
    options = {**asdict(Options()), **newest.get("options", {})}
    lineage = replace(
        lineage_of(carry, strategy["name"], strategy["args"], base["name"], base["hash"]),
        parents=_parents_of(folders[0].lineage.get("parent", {})),
        seeds={"seed": newest.get("seed"), "order_seed": options.get("order_seed")},
        versions=dict(newest.get("versions", {})),
        options=newest.get("options", {}),
    )
    facts = {**facts_of_run(folders, options), "output_name": options["output_name"] or title}
    header = {
        **kohya_header(options, facts),
        **_modelspec(folders, options, lineage, title),
        **lineage.to_metadata(),
        **size_header(adapter),
    }
    return strip_metadata(header) if options["no_metadata"] else header


def _modelspec(
    folders: Sequence[TaskFolder], options: Mapping[str, Any], lineage: Lineage, title: str
) -> dict[str, str]:
    """Stability's entries, with what the metadata_* options say."""
    newest = folders[-1].lineage
    predicts_v = str(newest.get("prediction_type", "")).startswith("v")
    given = {
        name.removeprefix(METADATA_OPTIONS): str(value)
        for name, value in options.items()
        if name.startswith(METADATA_OPTIONS) and name != "metadata_title" and value
    }
    least, most = options["min_timestep"], options["max_timestep"]
    if least is not None or most is not None:
        given["timestep_range"] = f"{least or 0},{most or 1000}"
    used = newest.get("data", {}).get("resolution")
    spec = ModelSpec(
        options["metadata_title"] or title,
        resolution=f"{used[0]}x{used[1]}" if used else _resolution(options["resolution"]),
        prediction_type="v" if predicts_v or options["v_parameterization"] else "epsilon",
        triggers=tuple(dict.fromkeys(r.concept for r in folders[-1].records)),
        version=lineage.versions.get("lcp_plugin", ""),
        extra=given,
    )
    return spec.to_metadata()


def _resolution(value: Any) -> str:
    """WxH of kohya's resolution option, which may be one number or two."""
    sides = re.findall(r"\d+", str(value or 1024))
    return f"{sides[0]}x{sides[-1]}" if sides else "1024x1024"


def _parents_of(parent: Mapping[str, Any]) -> tuple[ParentFile, ...]:
    """What the run's first task was chained on; the name only, not the path to it."""
    if not parent.get("hash"):
        return ()
    return (ParentFile(Path(str(parent.get("source") or "parent")).name, str(parent["hash"])),)


# -------------------------------------------------------------------------------- of sd-scripts


def counts_of(header: Mapping[str, str]) -> dict[str, int]:
    """Images and steps that sd-scripts tells of a training, for the task's record."""
    facts: dict[str, int] = {}
    try:
        folders = json.loads(header.get("ss_dataset_dirs", "{}"))
        facts["images"] = sum(int(f["img_count"]) for f in folders.values())
        facts["steps"] = int(header["ss_steps"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {name: count for name, count in facts.items() if count}


def complete_header(
    given: Mapping[str, str], adapter: Adapter, lineage: Lineage, inherited: int
) -> dict[str, str]:
    """What sd-scripts says of its training, with our lineage, trigger words, and the rank and alpha
    that the file really has. `inherited`: tasks of the parent, whose words are added.
    """
    title = given.get(f"{MODELSPEC}title") or given.get("ss_output_name") or "lora"
    spec = ModelSpec(title, triggers=lineage.triggers).to_metadata()
    if any(key.startswith(MODELSPEC) for key in given):
        spec = {TRIGGERS: spec.get(TRIGGERS, "")}
    try:
        own = json.loads(given.get("ss_tag_frequency") or "{}")
    except ValueError:
        own = {}
    words = lineage.tasks[:inherited] if own else lineage.tasks
    tags = tags_header(own if isinstance(own, dict) else {}, words)
    return {**given, **spec, **tags, **size_header(adapter), **lineage.to_metadata()}


# ------------------------------------------------------------------ of files made from files


def merged_header(
    lineage: Lineage,
    title: str,
    merged_from: Sequence[str],
    extra: Mapping[str, str],
    truncation: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The header of a file that a tool put together: what it is, its words, its parts.

    `extra`: entries beside these, or instead of them; "" takes one away.
    """
    version = lineage.versions.get("lcp_plugin", "")
    spec = ModelSpec(title, triggers=lineage.triggers, merged_from=merged_from, version=version)
    header = {**minimal_header(title, lineage.tasks), **spec.to_metadata()}
    header |= {**lineage.to_metadata(), **extra, **how_made(truncation)}
    return {key: value for key, value in header.items() if extra.get(key, "said")}


def copied_header(metadata: Mapping[str, str], intact: bool) -> dict[str, str]:
    """What a file's header still says of its tensors in another form.

    `intact`: they are those that were written with its lineage.
    """
    gone = (*HASHES, OWN_HASH, DIFFUSERS_METADATA)
    kept = {key: value for key, value in metadata.items() if key not in gone}
    return kept if intact else mixed(kept)


def derived_header(
    metadata: Mapping[str, str],
    parent: ParentFile | None,
    truncation: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """The header of what is no longer the model that was read: `parent` is what was read."""
    return {**derived(metadata, parent), **how_made(truncation, weights)}
