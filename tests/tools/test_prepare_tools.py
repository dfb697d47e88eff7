"""The tools that arrange DreamBooth and UnlearnCanvas downloads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lcp_plugin.config.load import load_config
from lcp_plugin.config.tables import read_table

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


dreambooth = load_tool("prepare_dreambooth")
unlearncanvas = load_tool("prepare_unlearncanvas")
FOLDERS = dreambooth.list_objects("objects")


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(1, count + 1):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.jpg")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A DreamBooth clone with three pictures of each object, and one that is not wanted."""
    for name in [*FOLDERS, "dog6"]:
        draw(tmp_path / "clone" / "dataset" / name, 3)
    return tmp_path / "clone"


@pytest.fixture
def canvas(tmp_path: Path) -> Path:
    """UnlearnCanvas with 12 styles of 20 objects of 6 pictures; the styles' objects are all."""
    for style in [*(f"Style_{i:02d}" for i in range(12)), "Seed_Images"]:
        for thing in range(20):
            draw(tmp_path / "canvas" / style / f"Object{thing:02d}", 1 + (thing % 2))
    return tmp_path / "canvas"


@pytest.mark.parametrize("inner", ["", "dataset"])
def test_dreambooth_objects_are_copied_from_clone_or_dataset(
    clone: Path, tmp_path: Path, inner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dreambooth.main([str(clone / inner), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FOLDERS)
    assert "30 images of 10 objects" in capsys.readouterr().out
    run = load_config(["--config", "objects", "--data_root", str(tmp_path / "out")])
    assert len(run.tasks) == 10


def test_fewer_images_than_asked_are_taken_and_told(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dreambooth.main([str(clone), str(tmp_path / "out"), "--num_images", "5"]) == 0
    assert "took what there is" in capsys.readouterr().out


def test_an_incomplete_clone_is_refused_by_what_is_missing(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.rmtree(clone / "dataset" / "teapot")
    assert dreambooth.main([str(clone), str(tmp_path / "out")]) == 1
    assert "lacks teapot" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_clone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dreambooth.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no DreamBooth objects" in capsys.readouterr().err


def test_the_draw_is_the_seeds_and_parts_objects_in_halves() -> None:
    styles = [f"s{i}" for i in range(60)]
    objects = [f"o{i}" for i in range(20)]
    one = unlearncanvas.draw_protocol(styles, objects, 10, 42)
    assert one == unlearncanvas.draw_protocol(styles[::-1], objects[::-1], 10, 42)
    assert one != unlearncanvas.draw_protocol(styles, objects, 10, 43)
    assert len(set(one.styles)) == 10
    assert sorted(one.train_objects + one.reference_objects) == sorted(objects)
    assert len(one.train_objects) == len(one.reference_objects) == 10


def test_styles_are_arranged_and_the_config_trains_on_them(
    canvas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert unlearncanvas.main([str(canvas), str(out), "--num_images", "2"]) == 0
    table = read_table(out / "styles.toml")
    assert len(table["tasks"]) == 10
    assert table["max_train_steps"] == 850
    run = load_config(["--config", str(out / "styles.toml")])
    for task in run.tasks:
        assert len(task.datasets[0].subsets) == 1  # one object a style
        references = sorted((out / "reference" / task.name).iterdir())
        assert len(references) == 10
        trained = task.datasets[0].subsets[0].image_dir.name
        assert trained not in [r.name for r in references]
        assert all(len(list(r.iterdir())) == 1 for r in references)
    assert "Seed_Images" not in {t.name for t in run.tasks}
    assert "1 image of a style, not 2" in capsys.readouterr().out


def test_fewer_styles_than_asked_are_taken_and_told(
    canvas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(canvas), str(tmp_path / "out"), "--num_styles", "30", "--num_images", "1"]
    assert unlearncanvas.main(flags) == 0
    assert "took what there is: 12 styles, not 30" in capsys.readouterr().out


def test_a_folder_without_styles_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unlearncanvas.main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "<Style>/<Object>/<n>.jpg" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_the_shared_data_can_be_prepared_and_loaded(tmp_path: Path) -> None:
    assert dreambooth.main([str(DATA / "dreambooth"), str(tmp_path / "objects")]) == 0
    load_config(["--config", "objects", "--data_root", str(tmp_path / "objects")])
    assert unlearncanvas.main([str(DATA / "styles"), str(tmp_path / "styles")]) == 0
    run = load_config(["--config", str(tmp_path / "styles" / "styles.toml")])
    assert len(run.tasks) == 5
