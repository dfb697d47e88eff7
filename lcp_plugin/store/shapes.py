"""The shapes of the JSON in a run's folder: all that readers rely on."""

from __future__ import annotations

from types import NoneType

from lcp_plugin.formats.shapes import Maybe

TEXT, COUNT = (str, NoneType), (int, NoneType)  # or null
ADVICE = "it was changed or damaged: restore it from a copy."
RECORD = {  # a learned task
    "index": int,
    "name": str,
    "kind": Maybe(str),
    "concept": Maybe(str),
    "prompts": Maybe([str]),
    "train_prompt": Maybe(str),
    "facts": Maybe(dict),
}
STRATEGY = {"name": TEXT, "args": [str]}
BASE = {
    "name": str,
    "hash": str,
    "origin": Maybe(str),
    "added": Maybe([{"path": str, "weight": float, "hash": str}]),
}
OPTIONS = {  # those that the base is made from
    "pretrained_model_name_or_path": Maybe(str),
    "base_weights": Maybe([str]),
    "base_weights_multiplier": Maybe([float]),
    "vae": Maybe(TEXT),
    "v_parameterization": Maybe(bool),
    "zero_terminal_snr": Maybe(bool),
    "max_token_length": Maybe(COUNT),
    "weighted_captions": Maybe(bool),
}
PARENT_NAMED = {"hash": Maybe(TEXT), "source": Maybe(TEXT)}
LINEAGE_SHAPE = {  # of a task folder
    "format": int,
    "task": RECORD,
    "tasks": [RECORD],
    "hashes": {"carry": str, "adapter": Maybe(str), "strategy": Maybe(str)},
    "strategy": STRATEGY,
    "base": BASE,
    "parent": Maybe(PARENT_NAMED),
    "options": Maybe(OPTIONS),
    "seed": Maybe(COUNT),
    "data": Maybe({"datasets": Maybe([{"subsets": Maybe([dict])}]), "tables": Maybe(bool)}),
    "training": Maybe(dict),
    "session": Maybe(dict),
}
PARENT_SHAPE = {  # of what a run started from
    "format": int,
    "tasks": [RECORD],
    "hashes": {"carry": str, "strategy": Maybe(str)},
    "strategy": STRATEGY,
    "base": {"name": TEXT, "hash": TEXT},
    "source": TEXT,
    "parent_hash": TEXT,
    "foreign": bool,
}
RUN_SHAPE = {  # run.json, whatever of it is there
    "name": Maybe(str),
    "status": Maybe(str),
    "fingerprint": Maybe({"tasks": list}),
    "options": Maybe(dict),
    "tasks": Maybe([RECORD]),
    "images": Maybe({str: [str]}),
    "strategy": Maybe(STRATEGY),
    "base": Maybe(BASE),
    "seed": Maybe(int),
    "order_seed": Maybe(COUNT),
    "ended": Maybe([int]),
    "said": Maybe([str]),
    "base_sampled": Maybe(bool),
    "sessions": Maybe(list),
    "session": Maybe(str),
    "parent": Maybe(PARENT_NAMED),
    "steps": Maybe({str: COUNT}),
    "to_draw": Maybe({str: COUNT}),
    "versions": Maybe({str: str}),
    "observers": Maybe({str: dict}),
    "closed": Maybe({str: {"of": list, "files": [str]}}),
    "deliverable": Maybe({"file": Maybe(str), "carry_hash": Maybe(TEXT)}),
    "command": Maybe({"line": Maybe(str), "folder": Maybe(str)}),
}
RESUMED_SHAPE = {  # and what a run that goes on needs of it
    "name": str,
    "status": str,
    "fingerprint": {"tasks": list},
    "tasks": [RECORD],
    "base": BASE,
    "seed": int,
}
STATE_SHAPE = {"task_index": int, "step": int, "hashes": {str: str}, "facts": dict}
