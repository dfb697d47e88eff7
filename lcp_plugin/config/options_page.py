"""The page that documents every option, written from the declarations themselves."""

from __future__ import annotations

from dataclasses import Field
from typing import Any

from lcp_plugin.config.convert import type_name
from lcp_plugin.config.network_args import NETWORK_ARGS
from lcp_plugin.config.option_text import OURS, choices_of, default_of
from lcp_plugin.config.options import option_fields, option_types

_HEAD = """# Options

Every option works in a config file (`learning_rate = 1e-4`) and on the command line
(`--learning_rate 1e-4`). Flags beat the config file, which beats a preset, which beats the
defaults; values in dataset files beat them all. Options without a mark are those of kohya's
sdxl_train_network.py and mean the same here unless the last column says otherwise; **new** ones are
our own; those marked *task* may also stand in a `[[tasks]]` table and then hold for that task.

In a config file any table but `[[tasks]]` and `[[datasets]]` is dissolved: its name means nothing.
True/false options are switched on by `--name` and off by `--name false`. `lcp options WORD` prints
the rows that a word is in.

This page is written by `python tools/options_page.py`.
"""

_TASK_TABLE = """
## A task: `[[tasks]]`

| key | meaning |
|---|---|
| `name` | name of the task and of its folder; needed, each its own |
| `kind` | `object` (default) or `style`: which prompts are the default ones |
| `concept` | what a prompt calls it, e.g. `"sks sneaker"`; unset: the name |
| `image_dir` | a folder of images, or a list of folders; for a style also a folder of one folder \
per object; folders named `<repeats>_<class>` inside count as kohya's. Relative ones are looked \
for in `data_root` if it is given, else in the current folder and beside the config |
| `train_prompt` | caption of images without a caption file; `{concept}` and `{class_name}` are \
filled in; unset: `a photo of {concept}`, or `{concept} image of {class_name}` for a style |
| `class_name` | what `{class_name}` means; unset: the image folder's name |
| `eval_prompts` | prompts of samples and evaluation; unset: the five of arXiv 2410.04891 |
| `dataset_config`, `[[tasks.datasets]]` | instead of `image_dir`: kohya's dataset file, or its \
tables inline |
| options marked *task* below | hold for this task only |
"""

_SUBSETS = """
## A data set: `dataset_config`, `[[datasets]]`, `[[tasks.datasets]]`

kohya's dataset files work unchanged: `[general]`, `[[datasets]]` and `[[datasets.subsets]]`, in
TOML or JSON; a key of a subset beats the data set's, which beats the general one, which beats
options. `num_repeats`, `class_tokens`, `is_reg`, `metadata_file` and `custom_attributes` stand only
there. `custom_attributes.diff_output_preservation = true` keeps the output for these images as it
was before the task.
"""


_COMING = """
## Coming from kohya

Give the config that you use with `sdxl_train_network.py` by `--config_file` (or `--config`): it is
one task, and the result is one LoRA in kohya's format. Add `[[tasks]]`, or `--prev` with an earlier
result, and it becomes a sequence.

* `network_module = "networks.lora"` means kohya's layers, initialisation and trained text encoders;
  without it only the UNet's attention is trained.
* Values are checked before a model is loaded, all mistakes are listed at once, and keys that only
  other tools know are told, not refused (`--strict_config` refuses them).
* What kohya's tools refuse to combine is resolved with a notice: caches step aside where captions
  or crops change from step to step; `constant` with warm-up becomes `constant_with_warmup`.
* The same command gives the same file: an unset `seed` means 42. Killed, it goes on where it was.
* `network_weights` keeps the file's own rank and alpha, in training and in what is saved.
* Two values of `text_encoder_lr` hold for one text encoder each.
* Cached latents and captions are keyed by everything they depend on, so stale ones are never used.
* Transparent pixels are laid on white, EXIF orientation is applied, captions fall back to `.txt`.
* `--dry_run` prints the plan: options with their source, images, buckets, steps, estimates.
"""


def render_options_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD, _COMING, _TASK_TABLE, _SUBSETS]
    groups: dict[str, list[str]] = {}
    for name, field in option_fields().items():
        groups.setdefault(field.metadata["group"], []).append(_row(name, field))
    for group, rows in groups.items():
        table = [
            "| option | type | default | meaning | differs from kohya |",
            "|---|---|---|---|---|",
        ]
        parts.append("\n".join([f"\n## {group}\n", *table, *rows]) + "\n")
    rows = [f"| `{key}` | {text} |" for key, text in NETWORK_ARGS.items()]
    head = ["\n## Keys of network_args\n", "| key | meaning |", "|---|---|"]
    parts.append("\n".join([*head, *rows]) + "\n")
    return "".join(parts)


def _row(name: str, field: Field[Any]) -> str:
    meta = field.metadata
    marks = " **new**" if meta["grade"] == OURS else ""
    marks += " *task*" if meta["per_task"] else ""
    meaning = meta["help"] + choices_of(field)
    differs = f"no effect: {meta['no_effect']}" if meta["no_effect"] else meta["differs"]
    cells = [
        f"`{name}`{marks}",
        type_name(option_types()[name]),
        default_of(field.default),
        meaning,
        differs,
    ]
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that Markdown tables show as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")
