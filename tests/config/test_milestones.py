"""When a task saves, samples and validates: hand-worked cases of kohya's rules."""

from __future__ import annotations

import pytest

from lcp_plugin.config.milestones import list_save_points, samples_at, validates_at
from lcp_plugin.config.options import Options


def saved(total: int, per_epoch: int, **given: object) -> list[tuple[int, str, str | None]]:
    points = list_save_points(Options(**given), total, per_epoch)
    return [(p.step, p.suffix, p.old_file) for p in points]


def test_nothing_is_saved_in_between_by_default() -> None:
    assert saved(100, 10) == []


def test_epochs_are_numbered_within_the_task_and_the_last_is_the_final_file() -> None:
    assert saved(40, 10, save_every_n_epochs=1) == [
        (10, "-000001", None),
        (20, "-000002", None),
        (30, "-000003", None),
    ]


def test_a_cut_last_epoch_leaves_the_whole_ones() -> None:
    assert [p[0] for p in saved(45, 10, save_every_n_epochs=2)] == [20, 40]


def test_the_last_n_epochs_are_kept() -> None:
    # kohya: after epoch e the file of epoch e - every * last goes
    found = saved(90, 10, save_every_n_epochs=2, save_last_n_epochs=2)
    assert found == [
        (20, "-000002", None),
        (40, "-000004", None),
        (60, "-000006", "-000002"),
        (80, "-000008", "-000004"),
    ]


def test_an_epoch_ratio_spreads_saves() -> None:
    # 10 epochs, ratio 3: every third epoch
    assert [p[1] for p in saved(100, 10, save_n_epoch_ratio=3)] == ["-000003", "-000006", "-000009"]
    assert len(saved(100, 10, save_n_epoch_ratio=50)) == 9  # at least every epoch


def test_steps_are_kept_by_steps_not_by_files() -> None:
    # kohya: gone = step - last - 1, rounded down to a multiple of every
    found = saved(60, 1000, save_every_n_steps=10, save_last_n_steps=20)
    assert found == [
        (10, "-step00000010", None),
        (20, "-step00000020", None),
        (30, "-step00000030", None),
        (40, "-step00000040", "-step00000010"),
        (50, "-step00000050", "-step00000020"),
    ]


def test_states_follow_the_files_or_their_own_number() -> None:
    given = {"save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_state": True}
    points = list_save_points(Options(**given), 50, 10)
    assert all(p.keeps_state for p in points)
    assert [p.old_state for p in points] == [None, "-000001", "-000002", "-000003"]
    own = list_save_points(Options(**given, save_last_n_epochs_state=3), 50, 10)
    assert [p.old_state for p in own] == [None, None, None, "-000001"]
    assert [p.old_file for p in own] == [None, "-000001", "-000002", "-000003"]


def test_without_save_state_no_state_is_removed() -> None:
    points = list_save_points(Options(save_every_n_epochs=1, save_last_n_epochs=1), 50, 10)
    assert {p.old_state for p in points} == {None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"sample_at_first": True}, [0]),
        ({"sample_every_n_steps": 4}, [4, 8, 12]),
        ({"sample_every_n_epochs": 1}, [5, 10]),
        ({"sample_every_n_epochs": 2, "sample_every_n_steps": 1}, [10]),  # epochs beat steps
    ],
)
def test_samples_are_drawn_at(given: dict[str, object], expected: list[int]) -> None:
    options = Options(sample_prompts="p.txt", **given)
    assert [s for s in range(13) if samples_at(options, s, 5)] == expected


def test_without_prompts_nothing_is_drawn() -> None:
    assert not samples_at(Options(sample_at_first=True), 0, 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [5, 10]),
        ({"validate_every_n_steps": 4}, [4, 8, 12]),
        ({"validate_every_n_epochs": 2}, [10]),
        ({"validate_every_n_epochs": 1, "validate_every_n_steps": 7}, [5, 7, 10]),
    ],
)
def test_validation_happens_at(given: dict[str, object], expected: list[int]) -> None:
    options = Options(validation_split=0.1, **given)
    assert [s for s in range(13) if validates_at(options, s, 5)] == expected


def test_without_a_split_nothing_is_validated() -> None:
    assert not validates_at(Options(validate_every_n_steps=1), 1, 5)
