"""Caption rules by hand-worked cases from the documented order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lcp_plugin.config.datasets import SubsetConfig
from lcp_plugin.data.captions import (
    CaptionSettings,
    CaptionTime,
    fill_wildcards,
    parse_weights,
    process_caption,
    read_caption,
    read_metadata,
    split_tags,
)
from lcp_plugin.errors import DataError

START = CaptionTime()


class Scripted(random.Random):
    """Draws given numbers, reverses instead of shuffling, chooses the last."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)

    def shuffle(self, x: Any) -> None:
        x.reverse()

    def choice(self, seq: Any) -> Any:
        return seq[-1]


def caption(text: str, *numbers: float, time: CaptionTime = START, **given: Any) -> str:
    settings = CaptionSettings.of(SubsetConfig(image_dir=Path("."), **given))
    return process_caption(text, settings, Scripted(*numbers), time)


def test_a_caption_stays_as_it_is_by_default() -> None:
    assert caption("1girl,  solo , smile") == "1girl,  solo , smile"


def test_only_the_first_line_counts_without_wildcards() -> None:
    assert caption("first\nsecond") == "first"


def test_prefix_and_suffix_are_joined_by_a_space() -> None:
    assert caption("a dog", caption_prefix="sks", caption_suffix="photo") == "sks a dog photo"


def test_a_dropped_caption_is_empty_even_with_a_prefix() -> None:
    assert caption("a dog", 0.29, caption_prefix="sks", caption_dropout_rate=0.3) == ""
    assert caption("a dog", 0.31, caption_dropout_rate=0.3) == "a dog"


def test_every_nth_epoch_drops_all_captions() -> None:
    epochs = [caption("x", time=CaptionTime(e), caption_dropout_every_n_epochs=2) for e in range(4)]
    assert epochs == ["x", "", "x", ""]


def test_shuffling_keeps_the_first_tags_and_joins_with_comma_and_space() -> None:
    assert caption("a,b , c,d", shuffle_caption=True, keep_tokens=1) == "a, d, c, b"


def test_the_keep_separator_beats_keep_tokens_and_a_second_one_keeps_the_end() -> None:
    given = {"shuffle_caption": True, "keep_tokens": 3, "keep_tokens_separator": "|||"}
    assert caption("a, b ||| c, d, e ||| f, g", **given) == "a, b, e, d, c, f, g"


def test_without_its_separator_keep_tokens_counts() -> None:
    given = {"shuffle_caption": True, "keep_tokens": 2, "keep_tokens_separator": "|||"}
    assert caption("a, b, c, d", **given) == "a, b, d, c"


def test_the_keep_separator_vanishes_where_nothing_is_shuffled() -> None:
    assert caption("a, b ||| c, d", keep_tokens_separator="|||") == "a, b, c, d"


def test_dropped_tags_are_those_drawn_below_the_rate_and_kept_ones_stay() -> None:
    given = {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}
    assert caption("a, b, c, d", 0.4, 0.5, 0.6, **given) == "a, c, d"


def test_tags_are_shuffled_before_they_are_dropped() -> None:
    given = {"caption_tag_dropout_rate": 0.5, "shuffle_caption": True}
    assert caption("a, b, c", 0.1, 0.9, 0.9, **given) == "b, a"


def test_the_secondary_separator_keeps_tags_together() -> None:
    given = {"shuffle_caption": True, "secondary_separator": ";;;"}
    assert caption("a;;;b, c", **given) == "c, a,b"


def test_another_separator_splits_but_the_result_has_commas() -> None:
    assert caption("a. b. c", shuffle_caption=True, caption_separator=".") == "c, b, a"


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, "a"), (4, "a, b"), (5, "a, b"), (8, "a, b, c"), (12, "a, b, c, d"), (99, "a, b, c, d")],
)
def test_tags_warm_up_from_the_minimum(step: int, expected: str) -> None:
    # tags at step s: floor(s (4 - 1) / 12) + 1
    given = {"token_warmup_min": 1, "token_warmup_step": 12}
    assert caption("a, b, c, d", time=CaptionTime(step=step), **given) == expected


def test_a_warm_up_below_one_is_a_share_of_all_steps() -> None:
    given = {"token_warmup_min": 0, "token_warmup_step": 0.5}  # ends at step 10 of 20
    assert caption("a, b", time=CaptionTime(step=5, total_steps=20), **given) == "a"
    assert caption("a, b", time=CaptionTime(step=10, total_steps=20), **given) == "a, b"


def test_wildcards_draw_one_alternative_and_double_braces_are_braces() -> None:
    assert caption("a {red|blue} {{dog}}", enable_wildcard=True) == "a blue {dog}"
    assert caption("a {red|blue} dog") == "a {red|blue} dog"


def test_wildcards_draw_one_of_several_lines() -> None:
    assert caption("one\ntwo", enable_wildcard=True) == "two"


def test_every_alternative_is_drawn_sooner_or_later() -> None:
    draws = random.Random(0)
    found = {fill_wildcards("{a|b|c}", draws) for _ in range(50)}
    assert found == {"a", "b", "c"}


def test_split_tags_names_the_three_parts() -> None:
    settings = CaptionSettings(keep_tokens=2)
    assert split_tags("a, b, c", settings) == (["a", "b"], ["c"], [])


def test_a_caption_file_is_read_without_bom_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffa dog \r\n\r\nin a park\r\n".encode())
    assert read_caption(file) == "a dog\nin a park"


def test_a_caption_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DataError, match="a.txt is not UTF-8"):
        read_caption(file)


def test_metadata_joins_caption_and_tags(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"x": {"caption": "a dog", "tags": "brown, big"}, "y": {"tags": "cat"}}')
    assert read_metadata(file) == {"x": "a dog, brown, big", "y": "cat"}


def test_broken_metadata_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text("[1]")
    with pytest.raises(DataError, match="wanted JSON like"):
        read_metadata(file)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog", [("a dog", 1.0)]),
        ("a (red) dog", [("a ", 1.0), ("red", 1.1), (" dog", 1.0)]),
        ("((x))", [("x", 1.1 * 1.1)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("(x:1.5) y", [("x", 1.5), (" y", 1.0)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2 * 1.1), (" c", 1.1)]),
        (r"\(x\)", [("(x)", 1.0)]),
        ("a: b", [("a: b", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_parsed(prompt: str, expected: list[tuple[str, float]]) -> None:
    ours = parse_weights(prompt)
    assert [t for t, _ in ours] == [t for t, _ in expected]
    assert [w for _, w in ours] == pytest.approx([w for _, w in expected])
