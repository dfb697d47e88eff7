"""The report: read from a run's folder, one file, escaped, usable."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_samples import CONCEPTS, EVIL, NAMES, Outline, make_run, record

from lcp_plugin.errors import DataError
from lcp_plugin.evaluation.scores import Spread
from lcp_plugin.report import page as page_module
from lcp_plugin.report import write_report
from lcp_plugin.report.blocks import Block, Text
from lcp_plugin.report.chapters import CHAPTERS, Chapter
from lcp_plugin.report.figures import draw_losses, draw_opposition, draw_tasks_since
from lcp_plugin.report.inline import embed_picture
from lcp_plugin.report.material import scores_of
from lcp_plugin.report.numbers import describe_differences
from lcp_plugin.report.page import build_page, render_page
from lcp_plugin.report.read import find_scores, read_run, read_scores

ROOT = Path(__file__).resolve().parents[2]


def test_a_chained_run_begins_where_its_parent_ended(tmp_path):
    folder = make_run(tmp_path / "second")
    shutil.rmtree(folder / "01_robot")
    shutil.rmtree(folder / "samples" / "01_robot")
    (folder / "parent").mkdir()
    (folder / "parent" / "lineage.json").write_text(json.dumps({"tasks": [record(0)]}))
    facts = read_run(folder)
    assert facts.start == 1
    assert sorted(facts.samples) == [1, 2, 3]
    text = write_report(folder).read_text("utf-8")
    assert "the start of this run, after task 1: sks robot" in text
    assert "the base model, before any task" not in text


def test_the_template_prints_every_kind_of_block_that_a_chapter_can_be_made_of():
    template = (ROOT / "lcp_plugin" / "report" / "blocks.html.j2").read_text("utf-8")
    kinds = {kind.kind for kind in Block.__subclasses__()}
    assert set(re.findall(r'b\.kind == "(\w+)"', template)) == kinds


def test_a_chapter_is_a_row_of_the_table(run, monkeypatch):
    hello = Chapter("hello", "Hello", "A new chapter", lambda material: [Text("made of blocks")])
    monkeypatch.setattr(page_module, "CHAPTERS", (*CHAPTERS, hello))
    text = render_page(build_page([read_run(run)], []))
    assert '<a href="#hello">Hello</a>' in text
    assert re.search(r'<section id="hello">\s*<h2>A new chapter</h2>\s*<p.*made of blocks', text)


def test_a_run_is_read_from_its_files(run):
    facts = read_run(run)
    assert (facts.strategy, facts.base, facts.seed) == ("merge_init", "tiny-sdxl", 0)
    assert [t.concept for t in facts.tasks] == list(CONCEPTS)
    assert facts.tasks[0].about == "object · 5 images · 60 steps · rank 16"
    assert len(facts.tasks[0].images) == 1
    assert sorted(facts.samples) == [0, 1, 2, 3]
    assert sorted(facts.samples[0]) == sorted(NAMES)
    assert list(facts.samples[1]) == ["robot"]
    assert len(facts.steps) == 180  # the line that was cut off does not count
    found = scores_of(read_scores(find_scores(run)), facts)["effnet"]
    assert np.isnan(found.matrix[1, 0])
    assert found.matrix[0, 2] == pytest.approx(0.6)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run's folder"):
        write_report(tmp_path)


def test_a_run_that_has_only_begun_still_has_a_report(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "new", "tasks": [record(0)]}))
    text = write_report(tmp_path).read_text("utf-8")
    assert "sks robot" in text
    assert "<input" not in text
    assert not Outline(text).open


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "url(" not in page.replace("url(#", "")
    assert "default-src 'none'" in page


def test_markup_is_balanced_and_ids_are_unique(page):
    outline = Outline(page)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))


def test_a_prompt_that_holds_a_script_stays_text(page):
    assert EVIL not in page
    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page


def test_the_policy_allows_exactly_the_one_script(page):
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'")


def test_every_picture_has_a_text_and_the_slider_a_label(page):
    outline = Outline(page)
    images = [a for tag, a in outline.attributes if tag == "img"]
    assert len(images) == 3 + 2 * (3 + 1 + 2 + 3)
    assert all(a["alt"] for a in images)
    slider = next(a for tag, a in outline.attributes if tag == "input")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "3", "3")
    labels = [a for tag, a in outline.attributes if tag == "label"]
    assert any(a.get("for") == slider["id"] for a in labels)


def test_numbers_on_the_page_are_the_hand_worked_ones(page):
    # S = (.6 + .6 + .75) / 3 = .65, F = (.2 + .1 + 0) / 3 = .1, base .25, retention .4 / .5
    for text in ("<dd>.650<small>", "<dd>.100<small>", "<dd>.750<small>", "<dd>.800<small>"):
        assert text in page
    assert "of the score gained over the base, not of the concepts" in page


def test_strategies_stand_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "a", "naive", decay=0.2), make_run(tmp_path / "b", "magmax")]
    output = write_report(runs, output=tmp_path / "both.html")
    text = output.read_text("utf-8")
    assert output == tmp_path / "both.html"
    for words in ("Strategies side by side", 'id="choose-run"', "naive", "magmax", "At the end"):
        assert words in text
    outline = Outline(text)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))


def test_a_bound_has_a_report_though_it_has_no_matrix(tmp_path):
    run = make_run(tmp_path / "a", "independent")
    file = run / "evaluation" / "scores.json"
    scores = json.loads(file.read_text())
    for found in scores["runs"][0]["metrics"].values():
        found.pop("matrix")
        found |= {"final": [0.5, 0.6, 0.7], "average_score": 0.6}
    file.write_text(json.dumps(scores))
    assert scores_of(scores, read_run(run)) == {}
    assert "independent" in write_report(run).read_text("utf-8")


def test_a_band_is_spoken_of_only_where_a_strategy_has_several_runs(tmp_path):
    one, two = make_run(tmp_path / "a", "naive"), make_run(tmp_path / "b", "magmax")
    again = make_run(tmp_path / "c", "naive", seed=1)
    said = [
        "the band is one" in write_report(runs, output=tmp_path / "r.html").read_text("utf-8")
        for runs in ([one, two], [one, again, two])
    ]
    assert said == [False, True]


def test_differences_between_strategies_are_printed_with_their_interval(tmp_path):
    run = make_run(tmp_path / "a")
    file = run / "evaluation" / "scores.json"
    scores = json.loads(file.read_text())
    scores["differences"] = [
        {"a": "magmax", "b": "naive", "metric": "effnet", "measure": "forgetting",
         "difference": -0.05, "low": -0.08, "high": -0.01, "pairs": 8},
        {"a": "magmax", "b": "naive", "metric": "effnet", "measure": "average_score",
         "difference": 0.01, "low": -0.02, "high": 0.04, "pairs": 8},
    ]  # fmt: skip
    page = build_page([read_run(run)], [scores])
    assert describe_differences([scores]) == [
        {"measure": "EffNet F", "pair": "magmax − naive", "difference": "−.050",
         "interval": "−.080 to −.010", "pairs": 8, "certain": True},
        {"measure": "EffNet S", "pair": "magmax − naive", "difference": "+.010",
         "interval": "−.020 to +.040", "pairs": 8, "certain": False},
    ]  # fmt: skip
    html = render_page(page)
    assert '<span class="best">−.050</span>' in html
    assert "<td>+.010</td>" in html  # not bold: 0 lies within its interval


def test_charts_take_the_pages_colours_and_keep_text_as_text():
    curves = {"naive": [Spread(0.8, 0.1, 2), Spread(0.6, 0.1, 2)], "<b>": [Spread(0.7, 0, 1)] * 2}
    svg = draw_tasks_since(curves, Spread(0.3, 0.0, 2), "DINO", "a")
    assert svg.startswith("<svg role")
    assert "var(--c1)" in svg
    assert "#0000" not in svg
    assert "tasks learned since" in svg
    assert "<b>" not in svg
    assert "var(--c2)" in draw_losses([("a $x$", [0.3, 0.2]), ("b", [0.2])], "a")
    assert "var(--c1)" in draw_opposition({"W_j - W_i": [0.1, 0.2]}, ["2", "3"], "a")


def test_a_large_picture_is_shrunk_and_an_unreadable_one_left_out(tmp_path):
    Image.new("RGB", (900, 600)).save(tmp_path / "large.png")
    picture = embed_picture(tmp_path / "large.png", "alt")
    assert picture.uri.startswith("data:image/jpeg;base64,")
    assert not picture.small
    (tmp_path / "broken.png").write_bytes(b"no")
    assert embed_picture(tmp_path / "broken.png", "alt") is None
