"""What peft keeps outside the tensors: ranks and alphas by name, and what kind of adapter it is.

    LoRA         D = (lora_alpha / r) B A, or lora_alpha / sqrt(r) with use_rslora
    LoHa, LoKr   D = (alpha / r) W, even where both matrices of a LoKr are whole

`rank_pattern` and `alpha_pattern` are regular expressions for the end of a module's name; the first
that matches holds (peft, utils/other.py get_pattern_key; LoraModel._create_and_replace). Initial
values that are taken out of the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) make a file that is no
change of the published weights: refused, with peft's own way to convert it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.adapter import Adapter
from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.keys import PREFIXES

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configuration
_DEFAULT = 8  # peft's own r, lora_alpha and alpha where a configuration leaves them out
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # kinds that are read
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights
_NOT_ADDABLE = {  # options whose result is no sum of W0 and an update
    "use_qalora": "a QALoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA, which changes some tokens only",
    "arrow_config": "an Arrow router of several LoRAs",
    "kasa_config": "a KaSA",
    "monteclora_config": "a MonteCLoRA",
    "layer_replication": "a LoRA of a model whose layers are repeated",
}


@dataclass(frozen=True)
class PeftConfigs:
    """peft's configuration of each model: prefix -> {r, lora_alpha, alpha_pattern, ...}."""

    by_prefix: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> PeftConfigs:
        """From adapter_config.json beside the file, or the header's `lora_adapter_metadata`.

        Raises:
            FileFormatError: damaged, or an adapter that cannot be added to other changes.
        """
        try:
            configs = cls(_read_configs(path, metadata))
            for prefix, config in configs.by_prefix.items():
                _check_kind(path, config)
                for name in ("alpha_pattern", "rank_pattern"):  # fails here, not half-way
                    _ = {re.compile(k): float(v) for k, v in (config.get(name) or {}).items()}
                if prefix in PREFIXES:
                    configs.alpha_of(prefix + "x", 1)
                    configs.scale_of(prefix + "x")
        except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise FileFormatError(f"the LoRA configuration of {path} is damaged.") from error
        return configs

    def only_prefix(self, path: Path) -> str | None:
        """The one model that a peft file without prefixes belongs to, if something says so."""
        if len(self.by_prefix) == 1:
            return next(iter(self.by_prefix))
        return next((p for p in PREFIXES if p == path.parent.name + "."), None)

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha of a LoRA that has no tensor for it; the rank where nothing is known."""
        alpha = self._alpha(module)
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self._config(module).get("use_rslora") else alpha

    def scale_of(self, module: str) -> float | None:
        """alpha / r of a LoHa or LoKr that has no alpha tensor; None where nothing is known."""
        alpha, config = self._alpha(module), self._config(module)
        if alpha is None:
            return None
        rank = _by_name(config.get("rank_pattern"), module)
        rank = config.get("r", _DEFAULT) if rank is None else rank
        if not float(rank) > 0:
            raise ValueError(f"r = {rank}")
        return alpha / float(rank)

    def _config(self, module: str) -> Mapping[str, Any]:
        return self.by_prefix.get(next(p for p in PREFIXES if module.startswith(p)), {})

    def _alpha(self, module: str) -> float | None:
        config = self._config(module)
        name = _ALPHA[_kind_of(config)]
        if config.get(name) is None and "peft_type" not in config:
            return None
        alpha = _by_name(config.get("alpha_pattern"), module)
        if alpha is None:
            alpha = config[name] if config.get(name) is not None else _DEFAULT
        return float(alpha)


def _read_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    by_prefix: dict[str, dict[str, Any]] = {}
    beside = path.parent / "adapter_config.json"
    if DIFFUSERS_METADATA in metadata:
        for name, value in dict(json.loads(metadata[DIFFUSERS_METADATA])).items():
            prefix, _, option = name.partition(".")
            by_prefix.setdefault(prefix + ".", {})[option] = value
    elif path.name == PEFT_FILE and beside.is_file():
        if not isinstance(config := read_json(beside), dict):
            raise TypeError("no table")
        by_prefix = dict.fromkeys(PREFIXES, config)
    return by_prefix


def _kind_of(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or "LORA").upper()


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raises FileFormatError for what is no change that adds up."""
    kind, init = _kind_of(config), str(config.get("init_lora_weights")).lower()
    if kind not in _ALPHA:
        raise FileFormatError(
            f"{path} is an adapter of peft's kind {kind}; LoRA, LoHa and LoKr are read. Merge it "
            "into its model with peft (merge_and_unload) and train on that."
        )
    if config.get("use_dora"):
        raise FileFormatError(
            f"{path} is a DoRA (use_dora), which cannot be added to other changes; fuse it "
            "into a checkpoint with the tool that made it."
        )
    if init.startswith(_FROM_BASE):
        raise FileFormatError(
            f"{path} was trained with init_lora_weights = {init}, which moves a part of the base "
            "into the factors: the file alone is no change of the base. Convert it with peft: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    found = next((words for name, words in _NOT_ADDABLE.items() if config.get(name)), None)
    if found:
        raise FileFormatError(f"{path} is {found}, which cannot be added to other changes.")


def _by_name(patterns: Any, module: str) -> Any:
    """The value of the first pattern that matches the end of a module's name; None without one.

    Text encoders are tried under both of their spellings (transformers 5 drops `text_model.`).
    """
    name = module.partition(".")[2]
    names = (name, name.removeprefix("text_model."))
    for pattern, value in dict(patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", spelled) for spelled in names):
            return value
    return None


# ------------------------------------------------------------------------------------- writing


def only_model(adapter: Adapter) -> str:
    """The prefix of the one model that an adapter changes. Raises FileFormatError for several."""
    prefixes = {prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in adapter)}
    if len(prefixes) != 1:
        raise FileFormatError(
            "a peft file holds one model; write UNet and text encoders into folders of their own."
        )
    return prefixes.pop()


def describe_models(adapter: Adapter) -> dict[str, Any]:
    """The configurations of all models in diffusers' flat form: `unet.r`, `unet.lora_alpha`, ..."""
    flat: dict[str, Any] = {}
    for prefix in PREFIXES:
        part = adapter.restrict(name for name in adapter if name.startswith(prefix))
        if part:
            flat.update({prefix + option: value for option, value in peft_config(part).items()})
    return flat


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """peft's LoraConfig of one model's factors, as a JSON table.

    Names of text encoders leave out `text_model.`, which transformers 5 no longer has; peft
    matches ends of names, so they fit version 4 too.
    """
    prefix = only_model(adapter)
    names = {name: name[len(prefix) :].removeprefix("text_model.") for name in adapter}
    rank = Counter(f.rank for f in adapter.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in adapter.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {names[n]: f.rank for n, f in adapter.items() if f.rank != rank},
        "alpha_pattern": {names[n]: f.alpha for n, f in adapter.items() if f.alpha != alpha},
        "target_modules": sorted(names.values()),
        "bias": "none",
        "lora_dropout": 0.0,
    }
