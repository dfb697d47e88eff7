"""Recognition of the learned object, on embeddings worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lcp_plugin.evaluation.evaluate import choose_eye
from lcp_plugin.evaluation.metric_table import METRICS
from lcp_plugin.evaluation.recognition import (
    Look,
    Recognition,
    judge,
    read_recognition,
    share_of_ceiling,
    tell_losses,
    tell_recognised,
)
from lcp_plugin.report.numbers import extra_values

X, Y, BETWEEN = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]


def share_recognised(images, references, own):
    named = {str(at): rows for at, rows in enumerate(references)}
    return judge(images, named, str(own)).share


def test_an_image_is_recognised_by_its_nearest_reference_not_by_the_mean():
    # task 0's references lie apart: their mean is farther from X than task 1's single reference is
    references = [np.array([X, Y]), np.array([BETWEEN])]
    assert share_recognised([X], references, own=0) == 1
    assert share_recognised([X], references, own=1) == 0
    assert share_recognised([X, BETWEEN, Y, BETWEEN], references, own=1) == 0.5


def test_a_tie_with_another_task_does_not_count_and_a_single_task_always_does():
    assert share_recognised([X], [np.array([X]), np.array([X])], own=0) == 0
    assert share_recognised([Y], [np.array([X])], own=0) == 1


def test_covered_is_the_share_of_the_way_from_base_to_ceiling():
    found = share_of_ceiling([0.3, 0.5, 0.4], [0.1, 0.5, 0.2], [0.5, 0.7, 0.2])
    assert found[:2] == pytest.approx([0.5, 0.0])
    assert math.isnan(found[2])


def test_the_report_shows_the_means():
    means = {"learned": 0.95, "final": 0.7, "base": 0.2, "covered": None}
    shown = dict(extra_values("recognition", {"mean": means}))
    assert shown == {
        "recognised, learned": ".950",
        "recognised, final": ".700",
        "recognised, base": ".200",
        "way covered": "–",
    }


def test_a_concept_became_the_one_that_most_of_its_images_are_nearest_to():
    references = {"robot": [X], "boat": [Y], "vase": [BETWEEN]}
    look = judge([Y, Y, Y, X], references, "robot")
    assert look == Look(0.25, "boat", 0.75)
    assert not look.is_recognised
    assert judge([X, X, X, Y], references, "robot").is_recognised
    assert not judge([X, X, Y, Y], references, "robot").is_recognised  # half is not most
    assert judge([X], references, "robot") == Look(1.0)  # and turned into nothing


def test_what_became_of_each_concept_is_one_line_and_survives_scores_json():
    kept, gone, blurred = Look(1.0), Look(0.0, "boat", 1.0), Look(0.5, "boat", 0.25)
    found = Recognition(
        "effnet",
        4,
        ("robot", "vase", "mushroom", "boat"),
        (
            (kept, kept, kept, gone),
            (None, kept, kept, blurred),
            (None, None, gone, gone),
            (None, None, None, kept),
        ),
        (gone,) * 4,
    )
    assert tell_recognised(found) == (
        "still recognised: 1 of 4; robot became boat; vase blurs into boat; "
        "mushroom never was recognised, it looks like boat"
    )
    written = found.to_json()
    assert written["recognised"] == ["boat"]
    assert written["turned_into"] == {"robot": "boat", "vase": "boat", "mushroom": "boat"}
    assert read_recognition({"tasks": list(found.tasks), "recognition": written}) == found
    assert read_recognition({"tasks": ["robot"]}) is None


def test_concepts_of_one_fate_share_a_phrase():
    gone, half, kept = Look(0.0, "boat", 1.0), Look(0.5, "boat", 0.25), Look(1.0)
    never = (None, gone)
    rows = ((kept, gone), (kept, gone), (kept, half), (kept, half), never, never, (None, kept))
    tasks = ("robot", "vase", "cup", "house", "mushroom", "clock", "boat")
    found = Recognition("effnet", 4, tasks, rows, (gone,) * 7)
    assert tell_losses(found, {"robot": "sks robot"}) == [
        "sks robot and vase became boat",
        "cup and house blur into boat",
        "mushroom and clock never were recognised, they look like boat",
    ]


def test_images_are_recognised_by_an_encoder_that_is_loaded_anyway():
    assert choose_eye([METRICS["clip_t"]]).name == "clip_i"
    assert choose_eye([METRICS["clip_t"], METRICS["dino"]]).name == "dino"
