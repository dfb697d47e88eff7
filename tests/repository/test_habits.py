"""The files beside the code: whole, and true of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lcp_plugin
from lcp_plugin.commands.doctor import build_parser

ROOT = Path(__file__).parents[2]
YAML_FILES = [
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
    *sorted((ROOT / ".github").rglob("*.yml")),
]


def read_yaml(*parts: str) -> dict[Any, Any]:
    table = yaml.safe_load(ROOT.joinpath(*parts).read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_yaml_file_is_a_table_without_a_key_twice(path: Path) -> None:
    class Once(yaml.SafeLoader):
        """Refuses a key that occurs twice, of which YAML would take the last."""

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        build = loader.construct_object
        pairs = [(build(key), build(value, True)) for key, value in node.value]
        assert len(dict(pairs)) == len(pairs), node.start_mark
        return dict(pairs)

    Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct)
    assert isinstance(yaml.load(path.read_text(encoding="utf-8"), Once), dict)


def test_the_workflow_tries_every_python_of_setup_and_claims_what_is_tested() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (pythons,) = (
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PYTHONS"
    )
    jobs = read_yaml(".github", "workflows", "tests.yml")["jobs"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    claimed = [(row["os"], row["python"]) for row in rows if not row["untried"]]
    assert claimed == [("ubuntu-latest", pythons[0])]
    assert {row["python"] for row in rows if row["os"] == "ubuntu-latest"} == set(pythons)
    assert {row["os"].split("-")[0] for row in rows} == {"ubuntu", "windows", "macos"}
    torch = re.search(r"torch ([\d.]+), CPU", (ROOT / "constraints.txt").read_text("utf-8"))
    assert torch is not None
    runs = [step.get("run", "") for step in jobs["tests"]["steps"]]
    assert any(f"torch=={torch[1]} " in run for run in runs)
    for command in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"):
        assert any(command in run for run in runs), command


def test_pre_commit_runs_what_the_workflow_runs() -> None:
    hooks = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["ruff check", "ruff format", "mypy"]


def test_a_bug_is_asked_for_the_report_by_an_option_that_exists() -> None:
    fields = read_yaml(".github", "ISSUE_TEMPLATE", "bug.yml")["body"]
    asked = [f["attributes"].get("description", "") for f in fields]
    (report,) = (text for text in asked if "lcp doctor --report" in text)
    assert "run.json" in report
    assert build_parser().parse_args(["--report"]).report
    assert build_parser().parse_args(["--report", "out/mine"]).report == Path("out/mine")
    assert len({f["id"] for f in fields}) == len(fields)


def test_version_and_date_are_the_same_wherever_they_stand() -> None:
    cited = read_yaml("CITATION.cff")
    sections = re.findall(
        r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sections[0] == "Unreleased"
    assert sections[1] == f"{cited['version']} ({cited['date-released']})"
    assert cited["version"] == lcp_plugin.__version__
    elsewhere = [
        path.name
        for path in (ROOT / "setup.py", ROOT / "pyproject.toml")
        if lcp_plugin.__version__ in re.sub(r">=[\d.]+", "", path.read_text(encoding="utf-8"))
    ]
    assert not elsewhere  # setup.py reads it from the package


def test_the_citation_names_the_paper() -> None:
    cited = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.04891"
    assert [a["family-names"] for a in paper["authors"]] == ["Staniszewski", "Zaleska", "Deja"]
