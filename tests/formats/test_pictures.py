"""Kinds of picture files, through the commands that a user gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcp_plugin.cli import main
from lcp_plugin.evaluation.chains import find_images
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.pictures import open_rgb
from lcp_plugin.report.read import read_run

WriteConfig = Callable[..., Path]
KINDS = {  # ending -> Pillow's name of the format
    "gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "jfif": "JPEG", "jpe": "JPEG", "webp": "WEBP",
    "bmp": "BMP", "jp2": "JPEG2000", "tga": "TGA", "ppm": "PPM", "JPG": "JPEG",
}  # fmt: skip
HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 40  # what such a file begins with


def plan_of(capsys: pytest.CaptureFixture[str], config: Path, *flags: str) -> str:
    """What --dry_run prints."""
    capsys.readouterr()
    assert main(["--config", str(config), "--dry_run", *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_what_pillow_reads_is_trained_scored_against_and_shown(
    write_config: WriteConfig, pictures: Path, tmp_path: Path, kind: str
) -> None:
    with Image.open(pictures / "disc0" / "00.png") as image:
        image.convert("RGB").save(pictures / "disc0" / f"more.{kind}", format=KINDS[kind])
    config = write_config("run", tasks=(0,), max_train_steps=1)
    assert main(["--config", str(config)]) == 0
    run = tmp_path / "out" / "run"
    lineage = read_json(run / "01_disc0" / "lineage.json")
    assert lineage["data"]["images"] == 4
    shown = read_run(run).tasks[0].images
    assert [p.name for p in shown] == [p.name for p in find_images(pictures / "disc0")]
    assert f"more.{kind}" in [p.name for p in shown]


def test_kinds_that_are_not_read_are_told_of_by_name(
    write_config: WriteConfig, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "disc0" / "phone.HEIC").write_bytes(HEIC)
    (pictures / "disc0" / "camera.cr2").write_bytes(b"II*\0")
    (pictures / "disc0" / "notes.txt").write_text("no picture", encoding="utf-8")
    (pictures / "disc0" / ".hidden.heic").write_bytes(HEIC)
    config = write_config("run", tasks=(0,), max_train_steps=1)
    told = [x for x in plan_of(capsys, config).splitlines() if "left out" in x]
    assert len(told) == 1
    assert told[0].strip().startswith("2 pictures are left out")
    assert "phone.HEIC" in told[0]
    assert "camera.cr2" in told[0]
    assert "pip install pillow-heif" in told[0]


def test_a_folder_of_nothing_else_says_so(
    write_config: WriteConfig, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (pictures / "disc0").iterdir():
        path.rename(path.with_suffix(".heic"))
    assert main(["--config", str(write_config("run", tasks=(0,))), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "holds no images" in error
    assert "pillow-heif" in error


def test_a_scan_above_pillows_limit_is_trained(
    write_config: WriteConfig, pictures: Path, tmp_path: Path
) -> None:
    Image.new("1", (16000, 12000), 1).save(pictures / "disc0" / "scan.png")
    config = write_config("run", tasks=(0,), max_train_steps=1)
    assert main(["--config", str(config)]) == 0
    lineage = read_json(tmp_path / "out" / "run" / "01_disc0" / "lineage.json")
    assert lineage["data"]["images"] == 4


def test_a_picture_beyond_all_reason_is_one_line(
    write_config: WriteConfig,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lcp_plugin.formats.pictures.LARGEST", 64 * 64 - 1)
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 1
    error = capsys.readouterr().err
    assert "3 images cannot be used" in error
    assert "00.png has 64 x 64 pixels" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize("part", ["held out", "mask"])
def test_every_file_that_the_run_will_read_is_decoded_before_a_model_loads(
    write_config: WriteConfig,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    flags: tuple[str, ...],
) -> None:
    from lcp_plugin.run import opening

    monkeypatch.setattr(opening, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    more: dict[str, object] = {"validation_split": 0.3}
    broken = sorted((pictures / "disc0").iterdir())
    if part == "mask":
        masks = tmp_path / "masks"
        masks.mkdir()
        for path in broken:
            (masks / path.name).write_bytes(path.read_bytes())
        broken, more = (
            [masks / "02.png"],
            {"masked_loss": True, "conditioning_data_dir": str(masks)},
        )
    for path in broken:  # one of them is held out, whichever the seed chooses
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 4])
        assert main(["--config", str(write_config("run", tasks=(0,), **more)), *flags]) == 1
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert path.name in error
        path.write_bytes(whole)


def test_a_file_is_read_once_to_check_it_and_to_name_it(
    write_config: WriteConfig, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, counted = Path.read_bytes, []

    def counting(self: Path) -> bytes:
        counted.append(self)
        return honest(self)

    monkeypatch.setattr(Path, "read_bytes", counting)
    assert main(["--config", str(write_config("run", tasks=(0,), max_train_steps=1))]) == 0
    read = [path for path in counted if pictures in path.parents]
    assert sorted(read) == sorted((pictures / "disc0").iterdir())


@pytest.mark.parametrize(
    ("mode", "colour"), [("CMYK", (0, 0, 0, 0)), ("I;16", 65535), ("F", 1.0), ("LA", (9, 0))]
)
def test_pictures_of_other_modes_become_the_white_that_they_show(
    tmp_path: Path, mode: str, colour: object
) -> None:
    path = tmp_path / ("a.png" if mode in ("LA", "I;16") else "a.tiff")
    Image.new(mode, (4, 4), colour).save(path)
    assert np.asarray(open_rgb(path)).tolist() == [[[255, 255, 255]] * 4] * 4


def test_damaged_exif_does_not_make_a_whole_picture_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "white").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff")
    assert open_rgb(tmp_path / "a.jpg").size == (8, 4)
