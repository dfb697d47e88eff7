"""The report: read from a run's folder, one file, escaped, usable; in a browser where one is."""

import base64
import hashlib
import html
import html.parser
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lcp_plugin.errors import DataError
from lcp_plugin.evaluation.recognition import Look, Recognition
from lcp_plugin.evaluation.scores import Spread
from lcp_plugin.report import page as page_module
from lcp_plugin.report import write_report
from lcp_plugin.report.blocks import Block, Text
from lcp_plugin.report.chapters import CHAPTERS, Chapter
from lcp_plugin.report.figures import draw_losses, draw_opposition, draw_tasks_since
from lcp_plugin.report.inline import embed_picture
from lcp_plugin.report.material import scores_of
from lcp_plugin.report.numbers import describe_differences
from lcp_plugin.report.page import build_page, render_page, say_recognised
from lcp_plugin.report.read import find_scores, read_run, read_scores
from lcp_plugin.run.samples import draw_grid
from lcp_plugin.tasks import TaskRecord

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>document.title='taken'</script>"
CONCEPTS = ("sks robot", f"zwz {EVIL}", "olb teapot & $x_1$")
NAMES = ("robot", "evil", "teapot")


def paint(path, seed, prompt=""):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 240, (3, 3, 3), dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    if prompt:
        info.add_itxt("prompt", prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((48, 48), Image.Resampling.BICUBIC).save(path, pnginfo=info)


def record(i):
    return {
        "index": i + 1,
        "name": NAMES[i],
        "kind": "object",
        "concept": CONCEPTS[i],
        "prompts": [f"a {CONCEPTS[i]} in a jail"],
        "train_prompt": f"a photo of {CONCEPTS[i]}",
        "facts": {"images": 5, "steps": 60, "rank": 16},
    }


def make_run(folder, strategy="merge_init", seed=0, decay=0.1):
    """A finished run's folder as the runner leaves it, without tensors."""
    records = [record(i) for i in range(3)]
    steps = []
    for i, task in enumerate(records):
        paint(folder.parent / "photos" / NAMES[i] / "0.png", 100 + i)
        path = folder / f"{i + 1:02d}_{NAMES[i]}"
        path.mkdir(parents=True)
        lineage = {
            "format": 1,
            "task": task,
            "tasks": records[: i + 1],
            "hashes": {"carry": "ab" * 32},
            "strategy": {"name": strategy, "args": ["init=gaussian"]},
            "base": {"name": "tiny-sdxl", "hash": "cd" * 32},
            "training": {"steps": 60},
        }
        (path / "lineage.json").write_text(json.dumps(lineage))
        for step in range(1, 61):
            loss = 0.3 / (1 + step / 20) + 0.01 * ((step * 7) % 5)
            steps.append({"event": "step", "task": task["name"], "task_index": i + 1,
                          "step": step, "loss": loss})  # fmt: skip
    for stage in range(4):
        stage_name = "00_base" if stage == 0 else f"{stage:02d}_{NAMES[stage - 1]}"
        for i in range(3):
            if stage == 0 or i < stage:
                for n in range(2):
                    paint(folder / "samples" / stage_name / f"{NAMES[i]}_{n}.png",
                          10 * stage + i + n, f"a photo of {CONCEPTS[i]}")  # fmt: skip
    (folder / "logs").mkdir()
    lines = "\n".join(json.dumps(s) for s in steps)
    (folder / "logs" / "steps.jsonl").write_text(lines + "\n" + '{"event": "step", "ta')
    run = {
        "name": folder.name,
        "options": {"strategy": strategy, "seed": seed, "sample_prompts": EVIL},
        "strategy": {"name": strategy, "args": []},
        "base": {"name": "tiny-sdxl", "hash": "cd" * 32},
        "tasks": records,
        "images": {n: [str(folder.parent / "photos" / n)] for n in NAMES},
        "seed": seed,
        "order_seed": None,
        "status": "finished",
    }
    (folder / "run.json").write_text(json.dumps(run))
    r = [[0.8, 0.8 - decay, 0.8 - 2 * decay], [None, 0.7, 0.7 - decay], [None, None, 0.75]]
    entry = {"name": folder.name, "path": folder.as_posix(), "strategy": strategy,
             "metrics": {"effnet": {"matrix": r, "base": [0.3, 0.2, 0.25]}}}  # fmt: skip
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "scores.json").write_text(json.dumps({"runs": [entry]}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("output") / "mine")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text("utf-8")


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


class Outline(html.parser.HTMLParser):
    """Tags and texts as a browser would see them."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.ids, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_template_prints_every_kind_of_block_that_a_chapter_can_be_made_of():
    template = (ROOT / "lcp_plugin" / "report" / "template.html.j2").read_text("utf-8")
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


# ------------------------------------------------------------------------------ recognition


def looks_like(share, other=None, other_share=0.0):
    return {"share": share, "other": other, "other_share": other_share}


def add_recognition(folder):
    """The robot is a teapot by the end, the second concept blurs, the teapot is there."""
    file = folder / "evaluation" / "scores.json"
    scores = json.loads(file.read_text("utf-8"))
    entry = scores["runs"][0]
    entry["tasks"] = list(NAMES)
    entry["stages"] = [{"name": f"after {i + 1:02d}_{name}"} for i, name in enumerate(NAMES)]
    entry["recognition"] = {
        "metric": "effnet",
        "images": 4,
        "base": [looks_like(0.25, "evil", 0.75)] * 3,
        "looks": [
            [looks_like(1.0), looks_like(0.75, "evil", 0.25), looks_like(0.25, "teapot", 0.75)],
            [None, looks_like(0.75, "robot", 0.25), looks_like(0.5, "robot", 0.25)],
            [None, None, looks_like(1.0)],
        ],
    }
    file.write_text(json.dumps(scores))
    return folder


def report_of(*arguments):
    """tools/report.py in this process; its exit status."""
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
    assert lead("").startswith("None of the three concepts is still recognised at the end. a ")
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
    assert "tools/evaluate.py mine" in (run / "report.html").read_text("utf-8")
    add_recognition(run)
    assert report_of(run) == 0
    assert "tools/evaluate.py mine" not in (run / "report.html").read_text("utf-8")
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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")


def browse(page, profile):
    """(DOM after scripts ran, what the browser logged)."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}",
        "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@needs_chromium
def test_a_browser_runs_the_page_without_an_error(run, tmp_path):
    report = write_report(run, output=tmp_path / "report.html")
    dom, log = browse(report, tmp_path / "profile")
    assert "CONSOLE" not in log
    assert "Refused" not in log
    assert "<title>mine</title>" in dom  # the script in the prompt did not run
    assert "2 tasks ago" in dom  # ours did
    assert 'aria-valuetext="after task 3: olb teapot &amp; $x_1$"' in dom


@needs_chromium
def test_the_slider_shows_the_pictures_of_its_stage(run, tmp_path):
    report = write_report(run, output=tmp_path / "report.html")
    text = report.read_text("utf-8")
    move = """<script>
      const slider = document.querySelector("input[type=range]");
      const seen = [];
      for (const stage of [3, 1, 0]) {
        slider.value = stage;
        slider.dispatchEvent(new Event("input"));
        const shown = [...document.querySelectorAll(".cell:not([hidden])")];
        seen.push(shown.map(c => c.dataset.stage + ":" + c.querySelectorAll("img").length).join());
      }
      const states = [...document.querySelectorAll(".state")].map(s => s.textContent).join();
      document.title = seen.join(" ") + " | " + states;
    </script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    report.write_text(text.replace("</body>", move), encoding="utf-8")
    dom, log = browse(report, tmp_path / "profile")
    assert "CONSOLE" not in log
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    states = ",".join(["not learned yet"] * 3)
    assert title == f"3:2,3:2,3:2 1:2,1:0,1:0 0:2,0:2,0:2 | {states}"
