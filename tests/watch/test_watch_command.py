"""`lcp watch` as it is typed: its one line, Ctrl-C, and what it says when there is no such run."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
import webbrowser

import pytest
from report_samples import make_run
from watched_runs import held, make_unfinished

from lcp_plugin.commands import watch
from lcp_plugin.config.load import load_config
from lcp_plugin.run.plan import make_plan
from lcp_plugin.run.record import describe_command
from lcp_plugin.store.lock import LOCK, is_held

BEGIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner's shell may ignore it
from lcp_plugin.commands.watch import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to the whole console")
def test_ctrl_c_ends_it_cleanly(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = process.stdout.readline()
    address = re.fullmatch(r"mine: (http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends\)\n", said)[1]
    with urllib.request.urlopen(address, timeout=60) as found:
        assert b"Learning" not in found.read()  # nobody trains it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (0, "", "")


def test_a_browser_is_opened_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    opened = []

    def stop(server, poll_interval):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcp_plugin.watch.server.Server.serve_forever", stop)
    monkeypatch.setattr(webbrowser, "open", opened.append)
    folder = str(make_run(tmp_path / "mine"))
    assert watch.main([folder]) == 0
    assert opened == []
    assert watch.main([folder, "--open"]) == 0
    assert opened[0] in capsys.readouterr().out


def test_a_missing_run_is_one_line_that_names_those_nearby(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 100), ("new", 200)):
        folder = make_run(tmp_path / "output" / name)
        (folder / LOCK).touch()
        for path in (folder, folder / LOCK):
            os.utime(path, (age, age))
    assert watch.main(["output/newt"]) == 1
    assert watch.main(["output"]) == 1
    told = capsys.readouterr().err.splitlines()
    found = [line.partition(" See ")[0] for line in told]  # the page that explains it
    names = f"{os.path.join('output', 'new')}, {os.path.join('output', 'old')}."
    nearby = f"runs nearby, the newest first: {names}"
    assert found == [
        f"error: {os.path.join('output', 'newt')} is not there; {nearby}",
        f"error: output is not a run's folder; {nearby}",
    ]


def test_without_any_run_nearby_it_says_what_to_give(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert watch.main(["mine"]) == 1
    assert "<output_dir>/<output_name>" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(tmp_path, capsys):
    folder = make_run(tmp_path / "mine")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert watch.main([str(folder), "--port", port]) == 1
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 .*\n", capsys.readouterr().err)
    assert watch.main([str(folder), "--port", "70000"]) == 1
    assert capsys.readouterr().err.startswith("error: port 70000")


@pytest.mark.skipif(os.name == "nt", reason="a lock that cannot be asked about")
def test_a_lock_is_seen_and_dies_with_its_process(tmp_path):
    assert is_held(tmp_path) is False
    with held(tmp_path) as process:
        assert is_held(tmp_path) is True
        process.kill()
        process.wait()
        assert is_held(tmp_path) is False


def test_the_command_needs_no_torch():
    asked = "import sys, lcp_plugin.watch.server; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_records_its_command_without_keys_and_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lcp", "train"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    words = ["--config", "quickstart", "--output_dir", str(tmp_path / "my output"), "--seed=3"]
    secrets = ["--wandb-api-key", "s3cret", "--huggingface_token=s3cret"]
    command = make_plan(load_config([*words, *secrets])).facts["command"]
    assert command["folder"] == os.getcwd()
    assert "s3cret" not in command["line"]
    if os.name == "posix":
        shown = [*words, "--wandb-api-key", "...", "--huggingface_token=..."]
        assert command["line"] == shlex.join(["lcp", "train", *shown])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train_continual_sdxl.py"])
    line = describe_command(["--config", "mine.toml"])["line"]
    assert line == (
        "accelerate launch --num_processes 2 train_continual_sdxl.py --config mine.toml"
    )
