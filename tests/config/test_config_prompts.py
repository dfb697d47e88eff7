"""kohya's three forms of sample prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcp_plugin.config.prompts import SamplePrompt, parse_line, read_prompts
from lcp_plugin.errors import ConfigError

FULL = SamplePrompt("a dog, at sea", "ugly, blurry", 1024, 768, 20, 7.0, 3, "euler_a")


def test_a_text_file_has_a_prompt_a_line_with_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text(
        "# a comment\n\n"
        "a dog, at sea --n ugly, blurry --w 1024 --h 768 --d 3 --l 7.0 --s 20 --ss euler_a\n"
        "a cat\n"
    )
    assert read_prompts(file) == (FULL, SamplePrompt("a cat"))


def test_defaults_are_kohyas_but_for_the_size() -> None:
    prompt = parse_line("a cat", "p.txt:1")
    assert (prompt.sample_steps, prompt.scale, prompt.seed) == (30, 7.5, None)
    assert (prompt.width, prompt.height) == (None, None)  # the base's native size, not 512


def test_hyphens_inside_a_prompt_are_no_settings() -> None:
    assert parse_line("a half-eaten --- pie", "x").prompt == "a half-eaten --- pie"


def test_settings_of_other_models_are_passed_over() -> None:
    assert parse_line("a cat --g 3.5 --s 5", "x") == SamplePrompt("a cat", sample_steps=5)


def test_a_toml_file_has_shared_values_and_subsets_that_win(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text(
        "[prompt]\nwidth = 1024\nheight = 768\nscale = 9\nnegative_prompt = 'ugly, blurry'\n"
        "[[prompt.subset]]\nprompt = 'a dog, at sea'\nscale = 7\nseed = 3\nsample_steps = 20\n"
        "sample_sampler = 'euler_a'\n[[prompt.subset]]\nprompt = 'a cat'\n"
    )
    first, second = read_prompts(file)
    assert first == FULL
    assert (second.prompt, second.scale, second.width) == ("a cat", 9.0, 1024)


def test_a_json_file_has_texts_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(["a cat --s 5", {"prompt": "a dog", "width": "512"}]))
    assert read_prompts(file) == (
        SamplePrompt("a cat", sample_steps=5),
        SamplePrompt("a dog", width=512),
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.txt", "a --q 3\n", "p.txt:1: unknown setting --q"),
        ("p.txt", "a toy --w=64 --h=64\n", "p.txt:1: setting --w=64 is not understood"),
        ("p.txt", "a toy --n blurry --s20\n", "setting --s20 is not understood; write a blank"),
        ("p.txt", "ok\na --w wide\n", "p.txt:2: width = 'wide': wanted a number"),
        ("p.json", "{}", "wanted a list"),
        ("p.json", '[{"promt": "x"}]', "unknown key 'promt'.*Did you mean prompt"),
        ("p.json", "[3]", "wanted a text or a table"),
        ("p.json", "[", "is not valid"),
        ("p.toml", "a = 1", r"wanted \[prompt\]"),
        ("p.toml", "[prompt]\n[[prompt.subset]]\nseed = 1", "prompt is missing"),
    ],
)
def test_broken_files_are_refused_by_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_capital_letters_and_settings_on_their_own_line_count(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a toy --W 48 --H 64\na cat\n --s 2 --D -1\n")
    assert read_prompts(file) == (
        SamplePrompt("a toy", width=48, height=64),
        SamplePrompt("a cat", sample_steps=2),
    )
