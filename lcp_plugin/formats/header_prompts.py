"""Prompts by a LoRA's own header, whoever wrote it: the trigger phrase, the classes of its folders
(`5_sks dog`), the tags that most of its captions have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lcp_plugin.tasks import MOST_CAPTIONS

MOST_TAGS = 3  # of a folder, put together to a prompt


def prompts_of_metadata(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Prompts by a header's own words, the most telling first; none where it has none."""
    trigger = metadata.get("modelspec.trigger_phrase", "").strip()
    if trigger:
        return (trigger,)
    folders = {**_object(metadata, "ss_dataset_dirs"), **_object(metadata, "ss_tag_frequency")}
    classes = [m[1] for name in folders if (m := re.fullmatch(r"\d+_(.*\S.*)", str(name)))]
    if classes:
        return tuple(f"a photo of {name}" for name in classes[:MOST_CAPTIONS])
    found = []
    for tags in _object(metadata, "ss_tag_frequency").values():
        if isinstance(tags, Mapping) and tags:
            ordered = sorted(tags, key=lambda tag: -float(tags[tag]))
            found.append(", ".join(str(tag).strip() for tag in ordered[:MOST_TAGS]))
    return tuple(found[:MOST_CAPTIONS])


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
