"""The report in a browser, where one is."""

import re
import subprocess

from browser import CHROMIUM, browsing, needs_chromium

from lcp_plugin.report import write_report


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


@needs_chromium
def test_the_page_fits_a_phone_but_for_tables_that_scroll(run, tmp_path):
    report = write_report(run, output=tmp_path / "report.html")
    with browsing(tmp_path / "profile") as tab:
        tab.show(report.as_uri(), width=390, height=844)
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.complaints == []
