"""The page of `lcp watch` in a browser, where one is: it follows a run and fits a phone."""

import shutil

import pytest
from browser import browsing, needs_chromium
from watched_runs import held, line, make_unfinished, served, steps, write_log

from lcp_plugin.watch import view

LEAD = "document.querySelector('.lead').textContent"
PICTURES = "document.querySelectorAll('.gallery img').length"
TWELVE_MORE = """document.querySelectorAll('.gallery tr').forEach(row => {
  for (let n = 0; n < 12; n++) row.append(row.lastElementChild.cloneNode(true)); })"""
SEEN = "[...document.querySelectorAll('.gallery img')].every(i => i.complete && i.naturalWidth)"


@needs_chromium
def test_a_browser_follows_a_run_and_keeps_what_its_reader_did(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "FRESH", 0.0)
    folder = make_unfinished(tmp_path / "mine")
    with browsing(tmp_path / "profile") as tab, held(folder), served(folder) as page:
        write_log(folder, steps(2, 37, 37), mode="a")
        tab.show(page.address)
        assert "step 37 of 60" in tab.evaluate(LEAD)
        tab.evaluate("document.querySelector('details').open = true")
        write_log(folder, steps(2, 38, 41), mode="a")
        tab.wait_for(f"{LEAD}.includes('step 41 of 60')")
        assert tab.evaluate("document.title").startswith("task 2 of 3, step 41")
        assert tab.evaluate("document.querySelector('details').open")
        before = tab.evaluate(PICTURES)
        shutil.copytree(folder / "samples" / "01_robot", folder / "samples" / "02_evil")
        tab.wait_for(f"{PICTURES} === {before + 1}")
        tab.wait_for(SEEN)
        write_log(folder, [line("error", 2, error="OSError", message="<b>full</b>")], mode="a")
    assert tab.complaints == []


@needs_chromium
def test_a_browser_tells_a_death_and_that_the_watching_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "FRESH", 0.0)
    folder = make_unfinished(tmp_path / "mine")
    with browsing(tmp_path / "profile") as tab:
        with served(folder) as page:
            with held(folder):
                tab.show(page.address)
                assert tab.evaluate("!document.querySelector('.going')")
            tab.wait_for("document.querySelector('.life').textContent === 'Died'")
            assert "lcp train" in tab.evaluate("document.querySelector('.going code').textContent")
            assert tab.complaints == []
        tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        tab.wait_for("document.getElementById('contact').textContent.includes('has ended')")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_in_both_colours(tmp_path, dark):
    folder = make_unfinished(tmp_path / "mine")
    with browsing(tmp_path / "profile") as tab, held(folder), served(folder) as page:
        tab.show(page.address, width=390, height=844, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 22, 26)" if dark else "rgb(251, 249, 244)")
        tab.wait_for(SEEN)
        wide = "e => !e.closest('.scroll, .sr, svg') && e.getBoundingClientRect().right > 390.5"
        every = f"[...document.querySelectorAll('main *')].filter({wide})"
        assert tab.evaluate(f"{every}.map(e => e.outerHTML.slice(0, 80))") == []
        tab.evaluate(TWELVE_MORE)  # tasks: the names keep a column that can be read
        assert tab.evaluate("document.querySelector('.gallery tbody th').offsetWidth") >= 64
    assert tab.complaints == []
