"""`lcp completion`: a script that a shell reads once, and what it completes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from lcp_plugin.commands.front import VERBS, main
from lcp_plugin.config.options import option_fields


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "error: shtab is missing: pip install shtab.\n"


def test_a_shell_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert capsys.readouterr().err.startswith("error: lcp completion: ")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_every_verb_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_a_shell_reads_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert main(["completion", shell]) == 0
    command = [shell, "-f", "-n"] if shell == "zsh" else [shell, "-f"]
    script = capsys.readouterr().out
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert not done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_options_choices_and_files(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    asked = """
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_lcp; echo "${COMPREPLY[*]}"
}
touch mine.toml
complete_words lcp ''
complete_words lcp train --
complete_words lcp train --preset ''
complete_words lcp train --config mi
complete_words lcp merge --precision b
"""
    done = subprocess.run(
        ["bash", "-c", capsys.readouterr().out + asked],
        cwd=str(tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    verbs, flags, presets, files, precisions = done.stdout.splitlines()
    assert verbs.split() == list(VERBS)
    assert {f"--{name}" for name in option_fields()} <= set(flags.split())
    assert presets.split() == ["8gb", "12gb", "24gb", "paper"]
    assert files == "mine.toml"
    assert precisions == "bf16"
