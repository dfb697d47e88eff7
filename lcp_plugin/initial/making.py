"""From a folder of photos to a configuration on disk and the plan of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.load import load_config
from lcp_plugin.data.contents import check_pictures
from lcp_plugin.errors import ConfigError, DataError, DiskError, LcpError
from lcp_plugin.initial import choices, draft
from lcp_plugin.initial.chain import Chain, read_chain
from lcp_plugin.initial.kinds import Guess, guess_kind, read_kinds
from lcp_plugin.initial.recipe import Request, form_lines, recipe_lines, run_lines
from lcp_plugin.initial.survey import Photos, Survey, survey
from lcp_plugin.initial.words import choose_words
from lcp_plugin.registry import create_strategy
from lcp_plugin.telling.wording import counted, join_words


def make_config(request: Request) -> str:
    """Writes the configuration; what was found, its plan, and the next command, as text.

    Raises:
        LcpError: one line, and nothing was written: no photos, one that cannot be read, a file of
            that name, a base that is none.
    """
    if request.file.exists() or request.file.is_symlink():
        raise ConfigError(f"{request.file} exists; give another name by --output, or remove it.")
    if request.strategy is not None:
        create_strategy(request.strategy, ())
    chain = read_chain(request.prev) if request.prev else None
    found = leave_out_learned(survey(request.photos), chain)
    check_pictures([image for photos in found.tasks for image in photos.images])
    free_gb = find_free_memory()
    base = choices.choose_base(request.base, free_gb, chain)
    tasks = draft_tasks(found, request, base.value, chain)
    told = chain.describe() if chain else []
    told += [*found.told, *(line for photos in found.tasks for line in photos.told)]
    train = join_words(["lcp", "train", "--config", str(request.file)])
    head = {
        "command": train,
        "photos": str(request.photos),
        "count": counted(len(tasks), "task"),
    }
    form = form_lines(chain, base.value)
    recipe = recipe_lines(request, base.value, form, found, free_gb)
    options = [*run_lines(request, base, chain), None, *recipe]
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
        f"next         {train}",
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


def leave_out_learned(found: Survey, chain: Chain | None) -> Survey:
    """Without the folders that the chain has learned from, which are told.

    Raises DataError where nothing new is left.
    """
    learned = chain.learned if chain else frozenset()
    old = [p for p in found.tasks if all(s.folder.resolve() in learned for s in p.shelves)]
    if chain is None or not old:
        return found
    names = ", ".join(photos.folder.name for photos in old)
    if len(old) == len(found.tasks):
        raise DataError(
            f"{chain.path} has learned every folder of {found.root} ({names}); put the photos of "
            "something new into a folder of its own."
        )
    told = (*found.told, f"{names}: left out; learned by the chain already")
    return replace(found, tasks=tuple(p for p in found.tasks if p not in old), told=told)


def draft_tasks(
    found: Survey, request: Request, base: str, chain: Chain | None
) -> list[draft.TaskDraft]:
    """A table for each folder, each with a rare word that no other has."""
    from lcp_plugin.sdxl.load import find_tokenizer

    tokenizer = find_tokenizer(base)
    names = draft.name_tasks(found.tasks, chain.names if chain else ())
    folders = [photos.folder.name for photos in found.tasks]
    kinds = read_kinds(request.kinds, folders)
    place = request.file.absolute().parent
    drafts = []
    for photos, name, concept in zip(
        found.tasks, names, choose_concepts(found.tasks, tokenizer, chain), strict=True
    ):
        given = kinds.get(photos.folder.name)
        guess = Guess(given, "as given by --kind") if given else guess_kind(photos)
        drafts.append(draft.draft_task(photos, guess, concept, name, base, place))
    return drafts


def choose_concepts(
    tasks: Sequence[Photos], tokenizer: Any | None, chain: Chain | None
) -> list[draft.Concept]:
    """A concept for each task: its own rare word, or one that nobody uses. Raises ConfigError."""
    own = [draft.find_own_concept(photos) for photos in tasks]
    used = draft.words_in_use(tasks) | (chain.list_words() if chain else set())
    fresh = iter(choose_words(own.count(None), tokenizer, used))
    concepts: list[draft.Concept] = []
    for photos, known in zip(tasks, own, strict=True):
        concept = known or draft.new_concept(photos, next(fresh), tokenizer is not None)
        texts = [*(chain.concepts if chain else ()), *(c.text for c in concepts)]
        twin = next((text for text in texts if concept.word in text.lower().split()), None)
        if twin is not None:
            why = f"'{concept.word}' is in '{twin}' too: give one of them another word"
            concept = draft.Concept(concept.text, concept.word, why, is_new=False)
        concepts.append(draft.note_tokens(concept, tokenizer))
    return concepts


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
    return describe_briefly(config, native)
