"""Rehearsal for other trainers: what a LoRA knows, drawn as a set of regularisation images.

A set is a folder that sd-scripts, OneTrainer and ai-toolkit read:

    OUT/1_sks robot/000.png, 000.txt   the concept's pictures and what each was drawn from
    OUT/dataset_config.toml            the same for sd-scripts and this trainer: is_reg = true

Prompts are those that `recall` rehearses. The pictures are the evaluation's (`pictures.Studio`):
seeds are fixed, one that is there is not drawn again, and none of another set is overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import toml

from lcp_plugin.config.names import make_fit
from lcp_plugin.config.options import option_fields
from lcp_plugin.errors import ConfigError, DataError, LineageError
from lcp_plugin.evaluation.pictures import Picture, Stage, Studio, name_weights
from lcp_plugin.formats.disk import write_bytes
from lcp_plugin.formats.header_prompts import prompts_of_metadata
from lcp_plugin.formats.pictures import list_images, read_size
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.base_shapes import read_shapes
from lcp_plugin.sdxl.base_weights import BaseSource, source_of
from lcp_plugin.sdxl.load import identify_base
from lcp_plugin.sdxl.long_prompts import TextRules
from lcp_plugin.store.parents import read_parent
from lcp_plugin.store.task_folder import Parent, TaskFolder, list_folders, read_folder
from lcp_plugin.strategies.recall_prompts import concept_of, prompts_of
from lcp_plugin.tasks import TaskRecord

SNIPPET = "dataset_config.toml"
HEAD = """\
# {images} regularisation images of {concepts} concepts, drawn from {source}.
# Add your own images as a further [[datasets.subsets]] at the end, in the same [[datasets]]:
# sd-scripts takes as many of these as there are images of yours, repeats included.

"""


@dataclass(frozen=True)
class Wishes:
    """What the user asks for, beside how it is sampled."""

    images: int = 16  # of each concept
    settings: float = 0.5  # share of them that show the concept elsewhere
    prompts: tuple[str, ...] = ()  # what a LoRA of another tool was trained with
    base: str = ""  # where the base model lies; "": as the LoRA says


@dataclass(frozen=True)
class RehearsalSet:
    """A model, and what it is to draw."""

    source: Path
    base: BaseSource
    stage: Stage
    prompts: Mapping[str, Sequence[str]]  # concept -> a prompt for each image

    def pictures(self, folder: Path) -> list[Picture]:
        """All pictures of the set, in `folder`."""
        return [
            Picture(
                folder / f"1_{make_fit(concept, 'concept')}" / f"{number:03d}.png", prompt, number
            )
            for concept, prompts in self.prompts.items()
            for number, prompt in enumerate(prompts)
        ]


# ------------------------------------------------------------------------------------ what to draw


def plan_set(source: Path, wishes: Wishes) -> RehearsalSet:
    """What the chain or LoRA at `source` knows, and how to ask for it.

    Raises:
        DataError: nothing there. ConfigError: no prompts, or no base, to go by.
        LineageError, FileFormatError: a damaged folder or file.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; give a run, a task folder or a LoRA file.")
    try:
        parent = read_parent(source)
    except LineageError as error:
        raise type(error)(str(error).removeprefix("--prev ")) from error
    records = _records(parent, source, wishes.prompts)
    base = _base_of(parent, source, wishes.base)
    index = max(record.index for record in records) + 1
    carry = parent.carry
    shapes = read_shapes(base.model)
    shapes.check(str(source), carry.delta, carry.biases)
    shapes.check(str(source), carry.adapter or {})
    weights = name_weights(base.hash, str(parent.hash or ""))
    return RehearsalSet(
        source=source,
        base=base,
        stage=Stage(source.name, weights, lambda: carry.change),
        prompts={r.concept: prompts_of(r, index, wishes.images, wishes.settings) for r in records},
    )


def _records(parent: Parent, source: Path, given: Sequence[str]) -> list[TaskRecord]:
    """The concepts that the model knows; of another tool's LoRA one, by prompts."""
    records = list(parent.carry.tasks)
    if not (parent.foreign and "source" in records[0].facts):
        if given:
            raise ConfigError(
                f"--prompts: {source} records the prompts of its tasks; leave them out."
            )
        return records
    prompts = tuple(given) or prompts_of_metadata(read_header(source).metadata)
    if not prompts:
        raise ConfigError(
            f"the header of {source} does not say what it was trained on; name prompts that it was "
            'trained with: --prompts "a photo of ...".'
        )
    known = replace(records[0], facts={**records[0].facts, "captions": list(prompts)})
    return [replace(known, concept=concept_of(known, prompts) or known.concept)]


def _base_of(parent: Parent, source: Path, given: str) -> BaseSource:
    """The base that the LoRA was trained on, where it lies now."""
    folder = _folder_of(source)
    if folder is not None:
        found = source_of(folder.lineage)
        return replace(found, origin=given) if given else found
    if not (given or parent.base_name):
        raise ConfigError(f"{source} does not say on which base it was trained; name it: --base.")
    facts = read_header(source).metadata
    found = BaseSource(
        name=parent.base_name or given,
        hash=parent.base_hash or identify_base(given or str(parent.base_name)).hash,
        origin=given,
        v_prediction=facts.get("modelspec.prediction_type", "").startswith("v"),
        texts=TextRules(_token_limit(facts.get("ss_max_token_length", ""))),
    )
    snr = facts.get("ss_zero_terminal_snr")
    return replace(found, zero_terminal_snr=snr == "True") if snr else found


def _token_limit(said: str) -> int | None:
    """max_token_length as a header has it; None where it has none."""
    choices = option_fields()["max_token_length"].metadata["choices"]
    return next((choice for choice in choices if str(choice) == said), None)


def _folder_of(source: Path) -> TaskFolder | None:
    """The task folder that is meant: itself, or the newest of a run."""
    place = source.parent if source.name == "carry.safetensors" else source
    if not place.is_dir():
        return None
    own = read_folder(place)
    inside = list_folders(place) if own is None else []
    return own or (inside[-1] if inside else None)


# ----------------------------------------------------------------------------------------- drawing


def draw_set(plan: RehearsalSet, studio: Studio, folder: Path) -> int:
    """Draws what is missing, writes the captions and, at last, the snippet; how many were drawn.

    Raises:
        DataError: pictures of another set lie there; nothing was changed.
    """
    pictures = plan.pictures(folder)
    _check_place(plan, studio, pictures)
    for picture in pictures:
        picture.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(picture.path.with_suffix(".txt"), f"{picture.prompt}\n".encode())
    drawn = studio.make(plan.stage, pictures)
    write_bytes(folder / SNIPPET, describe_set(plan, pictures).encode())
    return drawn


def _check_place(plan: RehearsalSet, studio: Studio, pictures: Sequence[Picture]) -> None:
    """Whether what lies in the folders is of this set."""
    known = {picture.path for picture in pictures}
    folders = {path.parent for path in known}
    strange = [p for f in folders if f.is_dir() for p in list_images(f) if p not in known]
    strange += [p.path for p in studio.missing(plan.stage, pictures) if p.path.exists()]
    if strange:
        raise DataError(
            f"{min(strange)} was drawn otherwise (another LoRA, prompt, size or seed) and would be "
            "mixed with this set; choose another --output, or remove it."
        )


def describe_set(plan: RehearsalSet, pictures: Sequence[Picture]) -> str:
    """The set as a dataset_config of sd-scripts."""
    folders = dict.fromkeys(picture.path.parent for picture in pictures)
    subsets = [
        {
            "image_dir": folder.absolute().as_posix(),
            "is_reg": True,
            "num_repeats": 1,
            "class_tokens": concept,
            "caption_extension": ".txt",
        }
        for folder, concept in zip(folders, plan.prompts, strict=True)
    ]
    size = max(read_size(pictures[0].path))
    head = HEAD.format(
        images=len(pictures), concepts=len(subsets), source=plan.source.absolute().as_posix()
    )
    table = {"datasets": [{"resolution": size, "subsets": subsets}]}
    return f"{head}{toml.dumps(table)}"
