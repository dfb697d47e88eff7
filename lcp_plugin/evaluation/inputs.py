"""What an evaluation's arguments name: runs, LoRA files, or a base, as chains with references."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.chains import (
    Chain,
    EvalTask,
    chain_of_adapters,
    find_images,
    read_chain,
)
from lcp_plugin.formats.lora_file import find_lora, read_lora
from lcp_plugin.sdxl.base_shapes import check_loras
from lcp_plugin.sdxl.base_weights import BaseSource, identify_sum, pair_multipliers
from lcp_plugin.sdxl.load import identify_base
from lcp_plugin.sdxl.long_prompts import TextRules
from lcp_plugin.telling.wording import counted

if TYPE_CHECKING:
    from lcp_plugin.config.load import RunConfig


def collect_chains(args: argparse.Namespace) -> list[Chain]:
    """The runs, adapters or base that the arguments name."""
    if args.runs:
        chains = [read_chain(run.resolve(), args.references) for run in args.runs]
        listed = read_tasks(read_config(args.tasks), None) if args.tasks else []
        known = {task.name: task for task in listed}
        return [move_base(fill_references(chain, known), args) for chain in chains]
    if args.tasks is None or (args.adapters is None and args.base is None):
        raise ConfigError(
            "nothing to score: give runs' folders, or --adapters with --base and --tasks, or "
            "--base with --tasks, or --generated with --references."
        )
    named = ("--pretrained_model_name_or_path", args.base) if args.base else ()
    config = read_config(args.tasks, named)
    tasks, base = read_tasks(config, args.references), choose_base(args, config.options)
    if args.adapters is None:
        return [Chain(base.name, base.name, "base", base, base.hash, tuple(tasks), ())]
    check_loras(base.model, {str(file): read_lora(file) for file in args.adapters})
    return [chain_of_adapters(args.adapters, tasks, base)]


def choose_base(args: argparse.Namespace, options: Options) -> BaseSource:
    """What --base and --base_weights name, its prompts read as by the options of a config."""
    parts = pair_multipliers(args.base_weights, args.base_weights_multiplier)
    found = identify_sum(identify_base(args.base), parts)
    added = tuple((p["path"], p["weight"], p["hash"]) for p in found.added)
    texts = TextRules(options.max_token_length, options.weighted_captions)
    return BaseSource(found.name, found.hash, found.origin, added, texts=texts)


def move_base(chain: Chain, args: argparse.Namespace) -> Chain:
    """The chain with its base and base_weights where --base and --base_weights say they lie now;
    hashes still decide whether they are the same.
    """
    base = replace(chain.base, origin=args.base) if args.base else chain.base
    if args.base_weights:
        if len(args.base_weights) != len(base.added):
            raise ConfigError(
                f"--base_weights names {counted(len(args.base_weights), 'file')}, but {chain.name} "
                f"was trained on {len(base.added)}."
            )
        paths = [str(find_lora(path)) for path in args.base_weights]
        added = tuple((p, w, h) for p, (_, w, h) in zip(paths, base.added, strict=True))
        base = replace(base, added=added)
    return replace(chain, base=base)


def read_config(config: Path, flags: Sequence[str] = ()) -> RunConfig:
    """A run's config; `flags` are further options of the training command, such as --data_root."""
    from lcp_plugin.config.load import load_config

    return load_config(["--config", str(config), *flags])


def read_tasks(config: RunConfig, references: Path | None) -> list[EvalTask]:
    """The [[tasks]] of a config, with their images or those in `references`."""
    tasks = []
    for index, task in enumerate(config.tasks, 1):
        folders = [Path(s.image_dir) for d in task.datasets for s in d.subsets if not s.is_reg]
        folders = [references / task.name] if references is not None else folders
        images = [image for folder in folders for image in find_images(folder)]
        tasks.append(
            EvalTask(index, task.name, task.kind, task.concept, task.eval_prompts, tuple(images))
        )
    return tasks


def fill_references(chain: Chain, tasks: Mapping[str, EvalTask]) -> Chain:
    """The chain with the images of a config's tasks where it has recorded none of its own."""
    filled = tuple(
        replace(t, references=tasks[t.name].references)
        if not t.references and t.name in tasks
        else t
        for t in chain.tasks
    )
    return replace(chain, tasks=filled)
