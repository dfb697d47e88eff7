"""What the page of `lcp watch` does not do: serve others, or what lies elsewhere."""

import base64
import hashlib
import re
import socket

import pytest
from report_samples import make_run
from watched_runs import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with a picture that is a link out of it, beside one that is not."""
    outside = tmp_path_factory.mktemp("outside")
    folder = make_run(outside / "output" / "mine")
    (outside / "secret.png").write_bytes((folder / "samples/00_base/evil_0.png").read_bytes())
    picture = folder / "samples" / "01_robot" / "robot_0.png"
    real = outside / "robot.png"
    real.write_bytes(picture.read_bytes())
    picture.unlink()
    picture.symlink_to(real)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    with served(folder) as client:
        client.live()
        yield client


def test_it_listens_on_this_machine_alone(page):
    assert page.server.server_address[0] == "127.0.0.1"
    assert page.server.socket.family == socket.AF_INET


@pytest.mark.parametrize(
    "path",
    [
        "run.json",
        "logs/steps.jsonl",
        "small/run.json",
        "whole/run.json",
        "whole/samples/grid.png",
        "whole/../run.json",
        "whole/../../secret.png",
        "whole/..%2f..%2fsecret.png",
        "whole/%2e%2e/%2e%2e/secret.png",
        "whole//etc/passwd",
        "whole/%2fetc%2fpasswd",
        "whole/samples/01_robot/..%5c..%5crun.json",
        "whole/samples/00_base/robot_0.png%00.txt",
        "small/samples/01_robot/robot_0.png",  # a link that leads out
        "whole/samples/01_robot/robot_0.png",
        "../run.json",
        "live/",
        "favicon.ico",
    ],
)
def test_nothing_but_the_page_and_its_pictures_is_served(page, path):
    found = page.ask(path)
    assert found.status == 404
    assert found.data == b"There is nothing at this address.\n"


def test_a_listed_picture_is_served_shrunk_and_whole(page, folder):
    file = folder / "samples" / "00_base" / "robot_0.png"
    whole = page.ask("whole/samples/00_base/robot_0.png?1")
    assert (whole.status, whole.data) == (200, file.read_bytes())
    small = page.ask("small/samples/00_base/robot_0.png")
    assert small.headers["Content-Type"] == "image/png"
    assert small.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_a_picture_that_became_a_link_since_it_was_listed_is_not_served(tmp_path):
    folder = make_run(tmp_path / "mine")
    with served(folder) as page:
        page.live()
        picture = folder / "samples" / "00_base" / "robot_0.png"
        picture.rename(tmp_path / "elsewhere.png")
        picture.symlink_to(tmp_path / "elsewhere.png")
        assert page.ask("whole/samples/00_base/robot_0.png").status == 404


@pytest.mark.parametrize("name", ["run.json", "logs", "evaluation", "02_evil/lineage.json"])
def test_facts_that_lie_elsewhere_are_not_shown(tmp_path, name):
    folder = make_run(tmp_path / "mine")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with served(folder) as page:
        for path in ("", "live"):
            found = page.ask(path)
            assert found.status == 409
            assert "leads out of the run's folder" in found.text
            assert "robot" not in found.text


def test_a_run_that_is_reached_by_a_link_is_shown(tmp_path):
    make_run(tmp_path / "disk" / "mine")
    (tmp_path / "mine").symlink_to(tmp_path / "disk" / "mine")
    with served(tmp_path / "mine") as page:
        assert "All 3 tasks are learned" in page.live()["head"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9", 200),  # a tunnel's near end has a port of its own
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1:x", 421),
        ("0.0.0.0", 421),
        ("", 421),
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(page, host, status):
    for path in ("", "live", "whole/samples/00_base/robot_0.png"):
        assert page.ask(path, Host=host).status == status


def test_another_sites_page_is_refused(page):
    assert page.ask("live", Origin="http://evil.example").status == 421
    assert page.ask("live", Origin="null").status == 421
    assert page.ask("live", Origin=page.address.rstrip("/")).status == 200
    headers = page.ask("live").headers
    assert headers["Access-Control-Allow-Origin"] is None
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_it_only_answers_questions(page, method):
    assert page.ask("live", method=method).status == 501


def test_head_answers_without_a_body(page):
    found = page.ask("live", method="HEAD")
    assert (found.status, found.data) == (200, b"")
    assert int(found.headers["Content-Length"]) > 0


def test_the_policy_allows_this_page_and_its_two_scripts_alone(page):
    found = page.ask("")
    policy = dict(
        part.split(" ", 1) for part in found.headers["Content-Security-Policy"].split("; ")
    )
    scripts = re.findall(r"<script>(.*?)</script>", found.text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert policy == {
        "default-src": "'none'",
        "img-src": "'self' data:",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert found.headers["Cache-Control"] == "no-store"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
