"""Pieces of config files, and the folders that they name."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

HEAD = 'pretrained_model_name_or_path = "tiny-sdxl"\n'


TASK = '[[tasks]]\nname = "dog"\nconcept = "sks dog"\nimage_dir = "dogs"\n'


def fill_folder(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
    return folder
