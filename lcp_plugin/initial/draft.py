"""A configuration's text: lines of key, value and the reason, put into `config.toml.j2`."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcp_plugin.config.findings import Findings
from lcp_plugin.config.task_table import check_folder_name
from lcp_plugin.errors import DataError
from lcp_plugin.initial.choices import count_steps
from lcp_plugin.initial.kinds import Guess
from lcp_plugin.initial.survey import Photos, Shelf, split_name
from lcp_plugin.initial.words import count_tokens, looks_rare
from lcp_plugin.telling.wording import agree, counted

HERE = Path(__file__).parent
LONGEST_NAME = 60  # characters of a task's name

Value = str | int | float | bool | Sequence[Any] | dict[str, Any]


@dataclass(frozen=True)
class Line:
    """`key = value  # why`."""

    key: str
    value: Value
    why: str = ""

    def __str__(self) -> str:
        reason = f"  # {as_comment(self.why)}" if self.why else ""
        return f"{self.key} = {as_toml(self.value)}{reason}"


@dataclass(frozen=True)
class Concept:
    """What prompts call a task's thing, and where its rare word comes from."""

    text: str
    word: str
    why: str = ""
    is_new: bool = True  # the word stands in no name or caption yet


@dataclass(frozen=True)
class TaskDraft:
    """A task's table, told."""

    name: str
    kind: str
    lines: tuple[Line, ...]


# -------------------------------------------------------------------------------- its concept


def find_own_concept(photos: Photos) -> Concept | None:
    """The concept that a folder's name or the captions hold already; None without a rare word."""
    words = photos.words.split()
    if words and looks_rare(words[0]):
        return Concept(photos.words, words[0], "as the folder's name has it", is_new=False)
    phrase = find_trigger(photos.captions.texts)
    if phrase:
        return Concept(phrase, phrase.split()[0], "as the captions have it", is_new=False)
    return None


def find_trigger(texts: Sequence[str]) -> str:
    """What captions share, from its rare word to the comma or where they part; "" without one.

    "a photo of sks dog in snow" and "a photo of sks dog, sitting" share "sks dog".
    """
    if len(texts) < 2:
        return ""
    split = [re.sub(r"\s*,\s*", " , ", text.lower()).split() for text in texts]
    shared = os.path.commonprefix(split)
    start = next((i for i, word in enumerate(shared) if looks_rare(word)), None)
    if start is None:
        return ""
    phrase = shared[start:]
    return " ".join(phrase[: phrase.index(",")] if "," in phrase else phrase)


def new_concept(photos: Photos, word: str, checked: bool) -> Concept:
    """The concept of a folder that has no rare word: the given one before the folder's words."""
    text = f"{word} {photos.words}" if re.search(r"[^\W\d_]", photos.words) else word
    token = "one token of this base" if checked else "one token of CLIP's vocabulary"
    why = f"'{word}' is {token}"
    return Concept(text, word, why if text != word else f"{why}; add what it is: '{word} dog'")


def note_tokens(concept: Concept, tokenizer: Any | None) -> Concept:
    """A word that the user has chosen, with what the base's tokenizer makes of it."""
    if concept.is_new or tokenizer is None:
        return concept
    count = count_tokens(tokenizer, concept.word)
    if count == 1:
        return concept
    why = f"{concept.why}; '{concept.word}' is {count} tokens for this base"
    return Concept(concept.text, concept.word, why, is_new=False)


def words_in_use(tasks: Iterable[Photos]) -> set[str]:
    """Every word of folder names and captions: none of them is given to a task."""
    texts = [text for task in tasks for text in (task.words, *task.captions.texts)]
    texts += [shelf.class_words for task in tasks for shelf in task.shelves]
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


# ---------------------------------------------------------------------------------- its table


def draft_task(
    photos: Photos, guess: Guess, concept: Concept, name: str, base: str, place: Path
) -> TaskDraft:
    """A task's lines; `place`: the folder of the configuration."""
    steps, rule = count_steps(photos, guess.kind, base)
    lines = [
        Line("name", name),
        Line("kind", guess.kind, guess.why),
        Line("concept", concept.text, concept.why),
        *_image_lines(photos, guess.kind, concept, place),
        *_caption_lines(photos, concept),
        Line("max_train_steps", steps, rule),
    ]
    return TaskDraft(name, guess.kind, tuple(lines))


def _image_lines(photos: Photos, kind: str, concept: Concept, place: Path) -> list[Line]:
    if photos.has_repeats:
        subsets = [_subset(shelf, concept, place) for shelf in photos.shelves]
        told = "repeats and words of the folder's name, as kohya's tools take them"
        return [
            Line("train_prompt", "{concept}"),
            Line("datasets", [{"subsets": subsets}], told),
        ]
    if not photos.has_motifs:
        own = Line("image_dir", path_from(place, photos.folder))
        prompt = [Line("train_prompt", "{concept} image")] if kind == "style" else []
        return [own, *prompt]
    numbered = all(re.match(r"^\d+_", shelf.folder.name) for shelf in photos.shelves)
    if kind == "style" and not numbered:
        return [Line("image_dir", path_from(place, photos.folder), "each folder a motif")]
    return [Line("image_dir", [path_from(place, shelf.folder) for shelf in photos.shelves])]


def _subset(shelf: Shelf, concept: Concept, place: Path) -> dict[str, Any]:
    words = split_name(shelf.class_words)
    return {
        "image_dir": path_from(place, shelf.folder),
        "num_repeats": shelf.repeats or 1,
        "class_tokens": f"{concept.word} {words}" if concept.is_new else words,
    }


def _caption_lines(photos: Photos, concept: Concept) -> list[Line]:
    captions = photos.captions
    if not captions.texts:
        return []
    own = agree(len(captions.texts), "has a caption of its own", "have a caption of their own")
    told = f"{len(captions.texts)} of {counted(len(photos.images), 'image')} {own}"
    lines = [Line("caption_extension", captions.ending, told)]
    if not all(concept.word in re.findall(r"\w+", text.lower()) for text in captions.texts):
        why = "the captions do not say the word, so it is put before them"
        lines.append(Line("caption_prefix", f"{concept.text},", why))
    return lines


def name_tasks(tasks: Sequence[Photos], known: Sequence[str] = ()) -> list[str]:
    """A name for each task that any system takes as a folder's, each only once along the chain,
    whose tasks so far are `known`.
    """
    names: list[str] = []
    for number, photos in enumerate(tasks, 1):
        given = photos.words if photos.has_repeats else photos.folder.resolve().name
        name = fit_name(given) or f"task{number}"
        before = [n.lower() for n in (*known, *names)]
        twins = sum(re.sub(r"_\d+$", "", n) == name.lower() for n in before)
        while name.lower() in before:
            twins += 1
            name = f"{fit_name(given) or 'task'}_{twins}"
        names.append(name)
    return names


def fit_name(text: str) -> str:
    """`text` as a folder's name of plain letters; empty where nothing is left of it."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", plain).strip("_-")[:LONGEST_NAME].rstrip("_-")
    findings = Findings()
    check_folder_name(name, "name", "", findings)
    return name if not findings.problems else fit_name(f"{name}_task") if name else ""


# ----------------------------------------------------------------------------------- its text


def path_from(place: Path, folder: Path) -> str:
    """A folder as the configuration in `place` names it: relative where it lies below it and the
    command is given there, else absolute.
    """
    where, folder = place.resolve(), folder.absolute()
    text = folder.as_posix()
    if where == Path.cwd().resolve() and where in folder.resolve().parents:
        text = folder.resolve().relative_to(where).as_posix()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{text!r} is not UTF-8; rename the folder.") from None
    return text


def as_toml(value: Value) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items())
        return f"{{ {pairs} }}"
    return f"[{', '.join(as_toml(inner) for inner in value)}]"


def as_comment(text: str) -> str:
    """A text on one line, without what a TOML comment cannot hold."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.encode("utf-8", "replace").decode("utf-8").split())


def render(
    head: dict[str, str], options: Sequence[Line | None], tasks: Sequence[TaskDraft],
    told: Sequence[str],
) -> str:  # fmt: skip
    """The whole file. `options`: None is an empty line."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # TOML, whose values `as_toml` quotes
    )
    return environment.get_template("config.toml.j2").render(
        head={key: as_comment(text) for key, text in head.items()},
        options=["" if line is None else line for line in options],
        tasks=tasks,
        told=[as_comment(line) for line in told],
    )
