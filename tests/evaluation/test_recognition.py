"""Recognition of the learned object, on embeddings worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lcp_plugin.evaluation.recognition import cover, share_recognised
from lcp_plugin.report.numbers import extra_values

X, Y, BETWEEN = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]


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
    found = cover([0.3, 0.5, 0.4], [0.1, 0.5, 0.2], [0.5, 0.7, 0.2])
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
