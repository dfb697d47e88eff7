"""Draw styles and objects from an UnlearnCanvas download and write the config that trains on them.

    python tools/prepare_unlearncanvas.py UNLEARNCANVAS data/styles
    accelerate launch train_continual_sdxl.py --config data/styles/styles.toml

UNLEARNCANVAS holds `<Style>/<Object>/<n>.jpg` (arXiv 2402.11846). The protocol is that of arXiv
2410.04891: seed 42 draws ten styles and, of twenty objects, ten to train on and ten to measure
with; each style is trained on five images of one object. Where there are fewer, it takes what there
is and says so. Written:

    data/styles/train/<Style>/<Object>/<n>.jpg        images to train on
    data/styles/reference/<Style>/<Object>/<n>.jpg    one image of each object never trained on
    data/styles/styles.toml                           the config, with the drawn names
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcp_plugin.errors import DataError, LcpError
from lcp_plugin.formats.pictures import list_images
from lcp_plugin.telling.wording import counted, join_words

SEEDS_FOLDER = "Seed_Images"  # the photos that were stylised: no style
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Draw:
    """Which styles are learned, each on which object, and which objects measure them."""

    styles: tuple[str, ...]
    train_objects: tuple[str, ...]
    reference_objects: tuple[str, ...]

    def object_of(self, index: int) -> str:
        """The object that style number `index` is trained on."""
        return self.train_objects[index % len(self.train_objects)]


def draw_protocol(
    styles: Sequence[str], objects: Sequence[str], num_styles: int, seed: int
) -> Draw:
    """Styles drawn, and objects parted in halves, from sorted names by one generator."""
    generator = random.Random(seed)
    drawn = generator.sample(sorted(styles), min(num_styles, len(styles)))
    shuffled = sorted(objects)
    generator.shuffle(shuffled)
    half = len(shuffled) // 2
    return Draw(tuple(drawn), tuple(shuffled[:half]), tuple(shuffled[half:]))


def survey(source: Path) -> tuple[list[str], list[str]]:
    """Styles, and the objects that every style has. Raises DataError."""
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the UnlearnCanvas download.")
    found = {
        style.name: {o.name for o in style.iterdir() if o.is_dir() and list_images(o)}
        for style in source.iterdir()
        if style.is_dir() and style.name != SEEDS_FOLDER
    }
    found = {style: objects for style, objects in found.items() if objects}
    if not found:
        raise DataError(f"{source} holds no <Style>/<Object>/<n>.jpg; give the folder of styles.")
    objects = set.intersection(*found.values())
    if len(objects) < 2:
        raise DataError(
            f"the styles in {source} share {counted(len(objects), 'object')}; wanted at least 2."
        )
    return sorted(found), sorted(objects)


def in_number_order(images: Sequence[Path]) -> list[Path]:
    """1.jpg, 2.jpg, ..., 10.jpg."""
    return sorted(images, key=lambda p: (int(p.stem) if p.stem.isdigit() else 0, p.name))


def copy_images(source: Path, target: Path, draw: Draw, num_images: int) -> int:
    """Copy images to train on and references; returns the least number trained on."""
    least = num_images
    for index, style in enumerate(draw.styles):
        thing = draw.object_of(index)
        chosen = in_number_order(list_images(source / style / thing))[:num_images]
        least = min(least, len(chosen))
        wanted = [(f"train/{style}/{thing}", image) for image in chosen]
        for other in draw.reference_objects:
            first = in_number_order(list_images(source / style / other))[0]
            wanted.append((f"reference/{style}/{other}", first))
        for folder, image in wanted:
            (target / folder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target / folder / image.name)
    return least


def write_tasks(draw: Draw, prefix: str) -> str:
    """The `[[tasks]]` tables of the drawn styles."""
    tables = []
    for style in draw.styles:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", style)
        concept = style.replace("_", " ")
        tables.append(
            f'[[tasks]]\nname = "{name}"\nkind = "style"\nconcept = "{concept}"\n'
            f'image_dir = "{prefix}{style}"\n'
        )
    return "\n".join(tables)


def write_config(template: Path, draw: Draw, seed: int, prefix: str) -> str:
    """The styles config with these tasks: everything before its first task is kept."""
    head = template.read_text(encoding="utf-8").split("[[tasks]]")[0]
    head = head.split("# Drawn with seed")[0].rstrip()
    drawn = (
        f"# Drawn with seed {seed}. Trained on, in turn: {', '.join(draw.train_objects)}.\n"
        f"# Measured with: {', '.join(draw.reference_objects)}.\n"
    )
    return f"{head}\n\n{_wrapped(drawn)}\n{write_tasks(draw, prefix)}"


def _wrapped(comment: str, width: int = 100) -> str:
    lines: list[str] = []
    for line in comment.splitlines():
        current = "#"
        for word in line[1:].split():
            if len(current) + 1 + len(word) > width:
                lines.append(current)
                current = "#"
            current += f" {word}"
        lines.append(current)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of <Style>/<Object>/<n>.jpg")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--num_styles", type=int, default=10)
    parser.add_argument("--num_images", type=int, default=5, help="of each style")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--template", type=Path, default=REPOSITORY / "configs" / "styles.toml")
    args = parser.parse_args(argv)
    try:
        styles, objects = survey(args.source)
        draw = draw_protocol(styles, objects, args.num_styles, args.seed)
        least = copy_images(args.source, args.target, draw, args.num_images)
    except LcpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    fewer = []
    if len(draw.styles) < args.num_styles:
        fewer.append(f"{counted(len(draw.styles), 'style')}, not {args.num_styles}")
    if least < args.num_images:
        fewer.append(f"{counted(least, 'image')} of a style, not {args.num_images}")
    if fewer:
        print(f"took what there is: {'; '.join(fewer)}")
    config = args.target / "styles.toml"
    config.write_text(write_config(args.template, draw, args.seed, "train/"), encoding="utf-8")
    command = join_words(["lcp", "train", "--config", str(config)])
    print(f"{counted(len(draw.styles), 'style')} in {args.target}; next: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
