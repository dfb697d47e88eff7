"""What recall draws, in words: earlier concepts as they were taught and elsewhere, and the base.

None of these is a prompt of the evaluation, or close to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lcp_plugin.tasks import Task, TaskRecord, class_words

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "object": (
        "a {concept} on the grass",
        "a {concept} in the snow",
        "a {concept} next to a big tree at night",
        "a {concept} in a blue hat and a red coat",
        "a {concept} on a wooden table",
        "a small {concept} at the beach",
    ),
    "style": (
        "{concept} image of a house",
        "{concept} image of a tree",
        "{concept} image of a person",
        "{concept} image of a boat",
        "{concept} image of a flower",
        "{concept} image of a street",
    ),
}
EVERYDAY = (
    "a photo of a cat on a sofa",
    "a woman with a green umbrella",
    "a wooden boat on the sea",
    "a plate of bread and cheese",
    "a yellow bird on a branch",
    "two children in a garden",
    "a bicycle against a brick wall",
    "a drawing of a castle on a hill",
)
OBJECT_PROMPT = "a photo of "


def prompts_of(record: TaskRecord, task_index: int, images: int, settings: float) -> list[str]:
    """A prompt for each image that is drawn of a task: what it was trained with, and the concept in
    settings of ours, which change from task to task.
    """
    known = [str(text) for text in record.facts.get("captions", ())]
    concept = concept_of(record, known)
    elsewhere = [text.format(concept=concept) for text in SETTINGS[record.kind] if concept]
    own = known or [record.train_prompt or f"{OBJECT_PROMPT}{record.concept}"]
    if "{" in own[0]:  # a style's template: what its images show is not recorded
        own = elsewhere
    others = min(images - 1, round(images * settings)) if elsewhere else 0
    chosen = [own[i % len(own)] for i in range(images - others)]
    first = task_index * others
    return chosen + [elsewhere[(first + i) % len(elsewhere)] for i in range(others)]


def concept_of(record: TaskRecord, captions: Sequence[str]) -> str:
    """What to put elsewhere: the record's concept; of another tool's LoRA, whose record has only
    its file's name, what a caption such as "a photo of sks dog" names, if one does.
    """
    if not _is_foreign(record):
        return record.concept
    named = (text for text in captions if text.startswith(OBJECT_PROMPT))
    return next(named, "").removeprefix(OBJECT_PROMPT)


def _is_foreign(record: TaskRecord | Task) -> bool:
    return isinstance(record, TaskRecord) and "source" in record.facts


def class_prompts(tasks: Iterable[TaskRecord | Task]) -> list[str]:
    """The tasks' prompts without what is rare in them: "a photo of a robot" of "sks robot", "image
    of a house" of a style. A concept of one word has no class that the base knows.
    """
    found: list[str] = []
    for task in tasks:
        words = class_words(task.kind, task.concept)
        if task.kind == "style":
            found += [text.format(concept="").strip() for text in SETTINGS["style"]]
        elif words != task.concept and not _is_foreign(task):
            found.append(f"{OBJECT_PROMPT}a {words}")
    return list(dict.fromkeys(found))


def everyday_prompts(task_index: int, images: int) -> list[str]:
    """A prompt for each image of what no task is about; others come first from task to task."""
    return [EVERYDAY[(task_index * images + i) % len(EVERYDAY)] for i in range(images)]
