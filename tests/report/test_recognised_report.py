"""A report begins with what is still recognised, in words and beside the grid."""

import html
import html.parser
import io
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from report_samples import (
    NAMES,
    Outline,
    add_recognition,
    looks_like,
    make_run,
    record,
)

from lcp_plugin.evaluation.recognition import Look, Recognition
from lcp_plugin.report.page import say_recognised
from lcp_plugin.run.samples import draw_grid
from lcp_plugin.tasks import TaskRecord

ROOT = Path(__file__).resolve().parents[2]


def report_of(*arguments):
    """`lcp report` in this process; its exit status."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import report

        return report.main([str(argument) for argument in arguments])
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_the_page_begins_with_what_is_still_recognised_and_what_the_rest_became(tmp_path):
    run = add_recognition(make_run(tmp_path / "mine"))
    assert report_of(run) == 0
    text = (run / "report.html").read_text("utf-8")
    lead = html.unescape(re.search(r'<p class="lead">(.*?)</p>', text)[1])
    assert lead.startswith(
        "One of three concepts is still recognised at the end: olb teapot & $x_1$. "
        "sks robot became olb teapot & $x_1$; "
    )
    assert "blurs into sks robot. Learned one after another with merge_init." in lead
    figures = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", text)
    assert figures[0] == (
        "still recognised", "1 of 3", "concepts, at the end; EffNet, 4 images each",
    )  # fmt: skip
    assert [label for label, _, _ in figures[1:3]] == ["average score S", "forgetting F"]
    assert "more than half, are nearest to its own" in text
    assert "✕ teapot" in text
    outline = Outline(text)
    assert not outline.open
    marked = [a["data-stage"] for tag, a in outline.attributes if a.get("data-lost")]
    assert marked == ["3", "3"]
    assert "% of what was learned" not in text


def test_all_or_none_recognised_is_said_as_such():
    def lead(kept):
        looks = tuple((Look(1.0 if name in kept else 0.0, "b", 1.0),) for name in "abc")
        found = Recognition("effnet", 4, ("a", "b", "c"), looks, ())
        return say_recognised(found, SimpleNamespace(tasks=()))

    assert lead("abc") == "All three concepts are still recognised at the end."
    assert lead("").startswith(
        "None of the three concepts is still recognised at the end. a, b and"
    )
    assert lead("ab").startswith("Two of three concepts are still recognised at the end: a and b. ")


def test_the_grid_of_a_scored_run_is_marked_where_a_concept_is_no_longer_recognised(tmp_path):
    run = make_run(tmp_path / "mine")
    grid = run / "samples" / "grid.png"
    records = [TaskRecord.from_json(record(i)) for i in range(3)]
    stages = [("00_base", "base")]
    stages += [(f"{i + 1:02d}_{name}", f"after {name}") for i, name in enumerate(NAMES)]
    draw_grid(run / "samples", records, stages)
    before = grid.read_bytes()
    assert report_of(run) == 0
    assert grid.read_bytes() == before  # nothing is known of what is recognised
    proposed = f"lcp evaluate {run}"
    assert proposed in (run / "report.html").read_text("utf-8")
    add_recognition(run)
    assert report_of(run) == 0
    assert proposed not in (run / "report.html").read_text("utf-8")
    plain = np.asarray(Image.open(io.BytesIO(before)).convert("L"), dtype=float)
    marked = np.asarray(Image.open(grid).convert("L"), dtype=float)
    assert marked.shape[0] > plain.shape[0]  # the legend
    assert (marked[plain.shape[0] :] < 64).any()
    changed = np.abs(marked[: plain.shape[0]] - plain) > 96
    step, corner = 150, 48
    lost = {(0, 3), (1, 3)}
    for row, column in itertools.product(range(3), range(4)):
        top, left = 34 + row * step, 150 + column * step
        share = changed[top : top + corner, left : left + corner].mean()
        assert (share > 0.3) == ((row, column) in lost), (row, column, share)


def test_a_comparison_begins_with_how_many_each_strategy_still_recognises(tmp_path):
    one = add_recognition(make_run(tmp_path / "a", "naive"))
    two = add_recognition(make_run(tmp_path / "b", "recall"))
    file = two / "evaluation" / "scores.json"
    scores = json.loads(file.read_text("utf-8"))
    for row in scores["runs"][0]["recognition"]["looks"]:
        row[-1] = looks_like(1.0)
    file.write_text(json.dumps(scores))
    assert report_of(one, two, "--output", tmp_path / "both.html") == 0
    text = (tmp_path / "both.html").read_text("utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', text)[1]
    assert lead == (
        "Still recognised at the end, of three concepts: naive 1, recall 3. "
        "Learned one after another, in 2 runs."
    )
    assert "<dt>recall</dt><dd>3 of 3<small>" in text
    assert text.count("no longer recognised: nearest to") >= 2  # the final pictures' too
