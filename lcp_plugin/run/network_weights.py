"""network_weights: the first task starts from the factors of a file, with their rank and alpha.

What the file changes and this run does not train (other modules, updates that are not plain LoRA)
rests in the carry from the start, so nothing of the file is lost. (kohya-ss/sd-scripts trains with
the new alpha and saves the old one, and drops what is not trained: train_network.py at 48d368fa.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.config.options import Options
from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, ResumeError
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import LoraFile, find_lora, read_lora
from lcp_plugin.hooks import Carry, TaskStart
from lcp_plugin.store.task_folder import Parent


def read_network_weights(options: Options) -> LoraFile | None:
    """The file that network_weights names."""
    return read_lora(options.network_weights) if options.network_weights else None


def check_start(options: Options, parent: Parent, is_new: bool) -> None:
    """Raises ConfigError beside --prev, ResumeError if the file has changed since the run began."""
    if not options.network_weights:
        return
    if options.prev:
        raise ConfigError(
            "prev and network_weights are two ways to go on from a LoRA; keep one (prev: a new "
            "task on it; network_weights: train its own factors further)."
        )
    if not is_new and parent.hash != file_model_hash(find_lora(options.network_weights)):
        raise ResumeError(
            f"network_weights = '{options.network_weights}' has changed since the run began; "
            "restore the file, or choose another --output_name."
        )


def parent_of(options: Options, file: LoraFile, trained: Adapter) -> Parent:
    """What a run that starts from a file stands on: the part of it that is not trained."""
    path = find_lora(str(options.network_weights))
    resting = file.delta + Delta.of(file.adapter.without(trained))
    return Parent(
        carry=Carry(resting, biases=file.biases),
        source=str(Path(str(options.network_weights))),
        hash=file_model_hash(path),
        foreign=True,
    )


def going_on(file: LoraFile, spec: AdapterSpec) -> Adapter:
    """The file's factors on modules that are trained."""
    return file.adapter.restrict(spec.shapes)


def start_from(start: TaskStart, file: LoraFile, spec: AdapterSpec) -> TaskStart:
    """The start with the file's factors in the place of the fresh ones."""
    return replace(start, adapter=Adapter({**start.adapter, **going_on(file, spec)}))


def common_shape(adapter: Adapter) -> tuple[int, float]:
    """Rank and alpha of most modules."""
    counts = Counter((factors.rank, factors.alpha) for factors in adapter.values())
    return counts.most_common(1)[0][0]
