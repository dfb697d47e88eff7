"""The command `lcp`: its overview, its verbs, and how all of them end."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lcp_plugin import __version__
from lcp_plugin.commands.front import GROUPS, VERBS, command, main
from lcp_plugin.delivery.merging import METHODS
from lcp_plugin.errors import ConfigError, DiskError
from lcp_plugin.evaluation.chains import CEILINGS
from lcp_plugin.evaluation.extras import EXTRAS
from lcp_plugin.evaluation.metric_table import METRICS
from lcp_plugin.evaluation.options import DTYPES
from lcp_plugin.formats.precisions import PRECISIONS

ROOT = Path(__file__).parents[2]
HEAVY = "{'torch', 'numpy', 'diffusers', 'PIL', 'matplotlib', 'jinja2'}"


def parser_of(verb: str) -> argparse.ArgumentParser:
    module = importlib.import_module(VERBS[verb].path)
    parser: argparse.ArgumentParser = module.build_parser()
    return parser


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_alone_it_prints_every_verb_with_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in VERBS.values():
        assert [line for line in lines if line.split() == [verb.name, *verb.about.split()]]
    assert all(title in lines for title, _ in GROUPS)
    assert sum(len(verbs) for _, verbs in GROUPS) == len(VERBS)
    assert max(map(len, lines)) <= 80


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lcp {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian"], "Did you mean lcp train?"),
        (["rehearsal"], "Did you mean lcp rehearse?"),
        (["Merge"], "Did you mean lcp merge?"),
        (["mine.toml"], "Did you mean lcp train --config mine.toml?"),
        (["--config", "mine.toml"], "Did you mean lcp train --config?"),
        (["xyzzy"], "`lcp` lists them."),
    ],
)
def test_an_unknown_verb_gets_what_was_meant(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert meant in told


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_own_help_and_a_mistyped_option_is_one_line(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["help", verb])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lcp {verb}")
    assert main([verb, "--no_such_option", "1"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: ")
    assert all(line.startswith("see ") for line in told[1:])  # the page that explains it


def test_no_help_imports_a_heavy_package() -> None:
    script = (
        "import sys\n"
        "from lcp_plugin.commands.front import VERBS, main\n"
        "main([])\n"
        "for verb in VERBS:\n"
        "    try:\n"
        "        main([verb, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"    print('heavy:', verb, sorted({HEAVY} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    told = [line for line in done.stdout.splitlines() if line.startswith("heavy: ")]
    assert told == [f"heavy: {verb} []" for verb in VERBS], done.stderr


def test_the_overview_imports_no_verb_and_no_parser() -> None:
    script = (
        "import sys; from lcp_plugin.commands.front import main; main([]); "
        "print(sorted(m for m in sys.modules if m.startswith('lcp_plugin') or m == 'argparse'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    modules = (
        "['lcp_plugin', 'lcp_plugin.commands', 'lcp_plugin.commands.front', 'lcp_plugin.errors']"
    )
    assert done.stdout.splitlines()[-1] == modules


def test_the_words_of_the_helps_are_those_of_the_tables() -> None:
    scoring = " ".join(parser_of("evaluate").format_help().split())
    assert ", ".join(METRICS) in scoring
    assert ", ".join(EXTRAS) in scoring
    assert set(DTYPES) == set(PRECISIONS)
    assert all(method in parser_of("merge").format_help() for method in METHODS)
    assert ", ".join(CEILINGS) in " ".join(parser_of("sweep").format_help().split())


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lcp_plugin", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, f"lcp {__version__}\n")


# ------------------------------------------------------------------------------ how a verb ends


def fail_with(error: BaseException) -> int:
    """The exit status of a verb that ends with an error."""

    @command
    def verb(argv: object) -> int:
        raise error

    return verb([])


def test_the_errors_of_a_user_are_lines_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(ConfigError("one.", "two.")) == 2
    assert capsys.readouterr().err == "error: one.\nerror: two.\n"
    assert fail_with(DiskError("full.")) == 1
    assert capsys.readouterr().err == "error: full.\n"
    assert fail_with(ModuleNotFoundError("No module", name="jinja2")) == 1
    assert capsys.readouterr().err == "error: jinja2 is missing: pip install jinja2.\n"
    assert fail_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped.\n"


def test_a_mistake_of_ours_is_not_hidden() -> None:
    for error in (ValueError("x"), ModuleNotFoundError("No module", name="lcp_plugin.none")):
        with pytest.raises(type(error)):
            fail_with(error)


def test_a_pipe_that_is_closed_early_is_no_mistake() -> None:
    script = f"{sys.executable} -m lcp_plugin lineage --help | head -1"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: lcp lineage")
    assert done.stderr == ""


# ------------------------------------------------------------------------------ the faces


FACES = {
    path: verb
    for path in sorted((ROOT / "tools").glob("*.py"))
    for verb in VERBS.values()
    if f"from {verb.path} import main" in path.read_text(encoding="utf-8")
}


def test_the_tools_are_faces_of_a_few_lines() -> None:
    names = {path.stem for path in FACES}
    assert names >= {"evaluate", "compare", "sweep", "report", "lineage", "merge_adapters"}
    assert names >= {"export", "conflicts", "doctor", "rehearsal_images"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 12 for path in FACES)


def test_a_face_finds_the_package_of_its_checkout(tmp_path: Path) -> None:
    face = ROOT / "tools" / "doctor.py"
    done = subprocess.run(
        [sys.executable, "-I", str(face), "--network_dim", "0"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --network_dim 0: at least 1. See docs/")
