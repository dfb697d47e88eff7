"""From a folder of photos to a configuration on disk and the plan of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.config.load import load_config
from lcp_plugin.data.contents import check_pictures
from lcp_plugin.errors import ConfigError, DiskError, LcpError
from lcp_plugin.initial import choices, draft
from lcp_plugin.initial.draft import Line
from lcp_plugin.initial.kinds import Guess, guess_kind, read_kinds
from lcp_plugin.initial.survey import Photos, Survey, count, survey
from lcp_plugin.initial.words import choose_words
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.load import TINY_NAME


@dataclass(frozen=True)
class Request:
    """What the command line says."""

    photos: Path
    output: Path | None = None  # unset: the folder's name in the current folder
    base: str | None = None
    kinds: tuple[str, ...] = ()
    preset: str | None = None
    strategy: str = "recall"

    @property
    def file(self) -> Path:
        """The configuration to write."""
        name = draft.fit_name(self.photos.resolve().name) or "photos"
        return self.output or Path(f"{name}.toml")


def make_config(request: Request) -> str:
    """Writes the configuration; what was found, its plan, and the next command, as text.

    Raises:
        LcpError: one line, and nothing was written: no photos, one that cannot be read, a file of
            that name, a base that is none.
    """
    if request.file.exists() or request.file.is_symlink():
        raise ConfigError(f"{request.file} exists; give another name by --output, or remove it.")
    create_strategy(request.strategy, ())
    found = survey(request.photos)
    check_pictures([image for photos in found.tasks for image in photos.images])
    free_gb = find_free_memory()
    base = choices.choose_base(request.base, free_gb)
    tasks = draft_tasks(found, request, base.value)
    told = [*found.told, *(line for photos in found.tasks for line in photos.told)]
    head = {
        "file": str(request.file),
        "photos": str(request.photos),
        "count": count(len(tasks), "task"),
    }
    options = [*_run_lines(request, base), None, *_recipe(request, base.value, found, free_gb)]
    write_new(request.file, draft.render(head, options, tasks, told))
    try:
        plan = describe(request.file)
    except LcpError:
        request.file.unlink()
        raise
    parts = [
        f"written      {request.file}: base {base.value} ({base.why})",
        *(f"             {line}" for line in told),
        *("", *_tell_kinds(tasks), "", plan, ""),
        f"next         lcp train --config {request.file}",
        f"             {request.file} has a reason beside each value; change what you know better",
    ]
    return "\n".join(parts)


def _tell_kinds(tasks: Sequence[draft.TaskDraft]) -> list[str]:
    """Kinds with their reasons, tasks of the same together."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        why = next(line.why for line in task.lines if line.key == "kind")
        found.setdefault(f"  {task.kind}, {draft.as_comment(why)}: ", []).append(task.name)
    return ["Kinds (--kind says otherwise)", *(why + ", ".join(n) for why, n in found.items())]


def find_free_memory() -> float | None:
    """GB of the first GPU that are free; None without one."""
    from lcp_plugin.doctor.machine import free_vram_gb

    return free_vram_gb()


def draft_tasks(found: Survey, request: Request, base: str) -> list[draft.TaskDraft]:
    """A table for each folder, each with a rare word that no other has."""
    from lcp_plugin.sdxl.load import find_tokenizer

    tokenizer = find_tokenizer(base)
    names = draft.name_tasks(found.tasks)
    folders = [photos.folder.name for photos in found.tasks]
    kinds = read_kinds(request.kinds, folders)
    place = request.file.absolute().parent
    drafts = []
    for photos, name, concept in zip(
        found.tasks, names, choose_concepts(found.tasks, tokenizer), strict=True
    ):
        given = kinds.get(photos.folder.name)
        guess = Guess(given, "as given by --kind") if given else guess_kind(photos)
        drafts.append(draft.draft_task(photos, guess, concept, name, base, place))
    return drafts


def choose_concepts(tasks: Sequence[Photos], tokenizer: Any | None) -> list[draft.Concept]:
    """A concept for each task: its own rare word, or one that nobody uses. Raises ConfigError."""
    own = [draft.find_own_concept(photos) for photos in tasks]
    fresh = iter(choose_words(own.count(None), tokenizer, draft.words_in_use(tasks)))
    concepts: list[draft.Concept] = []
    for photos, known in zip(tasks, own, strict=True):
        concept = known or draft.new_concept(photos, next(fresh), tokenizer is not None)
        twin = next((c.text for c in concepts if c.word == concept.word), None)
        if twin is not None:
            why = f"'{concept.word}' is in '{twin}' too: give one of them another word"
            concept = draft.Concept(concept.text, concept.word, why, is_new=False)
        concepts.append(draft.note_tokens(concept, tokenizer))
    return concepts


def _run_lines(request: Request, base: choices.Choice) -> list[Line]:
    name = draft.fit_name(request.file.stem) or "photos"
    told = ""
    if request.strategy == "recall":
        told = "rehearses what was learned, for about twice the time; merge_init does not"
    return [
        Line("pretrained_model_name_or_path", base.value, base.why),
        Line("strategy", request.strategy, told),
        Line("output_dir", "output"),
        Line("output_name", name, f"the LoRA will be output/{name}.safetensors"),
        Line("seed", 0),
    ]


def _recipe(request: Request, base: str, found: Survey, free_gb: float | None) -> list[Line]:
    """How every task is trained, on the embedded base or on SDXL."""
    if base == TINY_NAME:
        if request.preset:
            raise ConfigError(f"--preset {request.preset}: is for SDXL; {TINY_NAME} needs none.")
        return [
            Line("network_dim", 16),
            Line("network_alpha", 16),
            Line("network_args", ["conv_dim=16", "conv_alpha=16"], "outlines are convolutions'"),
            Line("optimizer_type", "AdamW"),
            Line("learning_rate", 1.6e-3, "as in configs/photos.toml, chosen for this base"),
            Line("lr_scheduler", "constant"),
            Line("train_batch_size", 4),
            Line("cache_latents", True),
            Line("cache_text_encoder_outputs", True),
            Line("samples_per_task", 1),
            Line("sample_steps", 12),
            Line("guidance_scale", 1.5),
            Line("evaluate", ["effnet"], "says at the end what is still recognised"),
            Line("evaluate_images", 2),
            Line("evaluate_prompts", 2),
        ]
    preset = choices.choose_preset(request.preset, free_gb)
    return [
        Line("preset", preset.value, preset.why),
        *_precision(free_gb),
        Line("network_dim", choices.RANK, "rank of a task's factors"),
        Line("network_alpha", choices.RANK),
        Line("learning_rate", 1e-4),
        Line("lr_scheduler", "constant"),
        *_sizes(base, found),
        Line("samples_per_task", 1, "images of every task so far behind each task"),
    ]


def _precision(free_gb: float | None) -> list[Line]:
    """fp16 where a preset's bf16 is unknown to the card."""
    import torch

    if free_gb is None or torch.cuda.is_bf16_supported():
        return []
    return [Line("mixed_precision", "fp16", "this card has no bf16")]


def _sizes(base: str, found: Survey) -> list[Line]:
    from lcp_plugin.sdxl.traits import SDXL_SIDE, is_at_hand, read_traits

    native = read_traits(base).native_side if is_at_hand(base) else SDXL_SIDE
    sizes = [size for photos in found.tasks for size in photos.sizes]
    side = choices.choose_side(sizes, native)
    lines = [] if side is None else [Line("resolution", side.value, side.why)]
    oblong = choices.count_oblong(sizes)
    if oblong:
        why = f"{oblong} of {len(sizes)} images are not square, and are kept whole"
        lines.append(Line("enable_bucket", True, why))
    return lines


def write_new(file: Path, text: str) -> None:
    """Writes a file that is not there yet. Raises ConfigError, DiskError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists; give another name by --output, or remove it.") from None
    except OSError as error:
        raise DiskError(
            f"{file} cannot be written ({error.strerror}); give another --output."
        ) from error


def describe(file: Path) -> str:
    """The plan of the run that a configuration describes, in short. Raises LcpError."""
    from lcp_plugin.run.dry_run import describe_briefly
    from lcp_plugin.sdxl.traits import SDXL_SIDE, is_at_hand, read_traits

    config = load_config(["--config", str(file)])
    name = config.options.pretrained_model_name_or_path
    native = read_traits(name).native_side if is_at_hand(name) else SDXL_SIDE
    return describe_briefly(config, native, estimates=name != TINY_NAME)
