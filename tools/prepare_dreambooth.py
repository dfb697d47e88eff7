"""Copy the ten objects of configs/objects.toml out of a clone of github.com/google/dreambooth.

    python tools/prepare_dreambooth.py DREAMBOOTH data/objects
    accelerate launch train_continual_sdxl.py --config configs/objects.toml --data_root data/objects

DREAMBOOTH is the clone, or its folder `dataset`. `--num_images N` takes the first N of each object.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lcp_plugin.config.sources import find_config
from lcp_plugin.config.tables import read_table
from lcp_plugin.errors import DataError, LcpError
from lcp_plugin.formats.pictures import list_images
from lcp_plugin.telling.wording import counted, join_words


def list_objects(config: str) -> list[str]:
    """The image folders that the config's tasks name, in order."""
    return [str(task["image_dir"]) for task in read_table(find_config(config))["tasks"]]


def find_dataset(source: Path, objects: Sequence[str]) -> Path:
    """The folder that holds the objects' folders. Raises DataError naming what is missing."""
    for folder in (source, source / "dataset"):
        if any((folder / name).is_dir() for name in objects):
            missing = [name for name in objects if not (folder / name).is_dir()]
            if missing:
                raise DataError(f"{folder} lacks {', '.join(missing)}; is the clone complete?")
            return folder
    raise DataError(
        f"{source} holds no DreamBooth objects ({objects[0]}, ...); give a clone of "
        f"github.com/google/dreambooth or its folder dataset."
    )


def copy_objects(
    source: Path, target: Path, objects: Sequence[str], num_images: int | None
) -> dict[str, int]:
    """Copy each object's images; returns how many of each. Nothing is overwritten by less."""
    counts: dict[str, int] = {}
    for name in objects:
        images = list_images(source / name)
        if not images:
            raise DataError(f"{source / name} holds no images; is the clone complete?")
        chosen = images[:num_images]
        (target / name).mkdir(parents=True, exist_ok=True)
        for image in chosen:
            shutil.copyfile(image, target / name / image.name)
        counts[name] = len(chosen)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="clone of the DreamBooth repository")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--num_images", type=int, help="images of each object; default all")
    parser.add_argument("--config", default="objects", help="config whose tasks are wanted")
    args = parser.parse_args(argv)
    try:
        objects = list_objects(args.config)
        folder = find_dataset(args.source, objects)
        counts = copy_objects(folder, args.target, objects, args.num_images)
    except LcpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    fewer = [f"{n} has {c}" for n, c in counts.items() if args.num_images and c < args.num_images]
    if fewer:
        wanted = counted(args.num_images, "image")
        print(f"fewer than {wanted}: {', '.join(fewer)}; took what there is")
    images, copied = counted(sum(counts.values()), "image"), counted(len(counts), "object")
    print(f"{images} of {copied} in {args.target}")
    words = ["lcp", "train", "--config", str(args.config), "--data_root", str(args.target)]
    print(f"next: {join_words(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
