"""What recall asks for where another tool taught the concept: its own words, and nothing else."""

from __future__ import annotations

from lcp_plugin.strategies.recall_prompts import concept_of, prompts_of
from lcp_plugin.tasks import TaskRecord


def foreign(*captions: str) -> TaskRecord:
    """A LoRA of another tool, as a chain records it: it is called by its file's name."""
    facts = {"source": "final_v2.safetensors", "captions": list(captions)}
    return TaskRecord(1, "final_v2", "object", "final_v2", facts=facts)


def test_a_file_s_name_is_no_concept() -> None:
    prompts = prompts_of(foreign("ink wash, boat"), 2, 4, 0.5)
    assert prompts == ["ink wash, boat"] * 4


def test_what_a_caption_names_is_rehearsed_elsewhere_too() -> None:
    record = foreign("portrait, sks dog", "a photo of sks dog")
    assert concept_of(record, record.facts["captions"]) == "sks dog"
    prompts = prompts_of(record, 2, 4, 0.5)
    assert prompts[:2] == ["portrait, sks dog", "a photo of sks dog"]
    assert all("sks dog" in prompt for prompt in prompts[2:])
    assert not [prompt for prompt in prompts if "final_v2" in prompt]
    assert not set(prompts[2:]) & set(prompts[:2])


def test_a_task_of_ours_is_called_by_its_concept() -> None:
    ours = TaskRecord(2, "toy", "object", "sks toy", facts={"captions": ["a photo of a shelf"]})
    assert concept_of(ours, ours.facts["captions"]) == "sks toy"
