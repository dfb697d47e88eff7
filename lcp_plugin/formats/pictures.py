"""Picture files: which of them are read, which are only told of, and their way to an upright RGB.

The one list of kinds for training, references, masks and report: what Pillow reads by itself, and
what a plugin of it reads (HEIC, JPEG XL) where that plugin is installed. EXIF orientation is
applied, transparency is laid on white (kohya keeps whatever colour lies beneath), 16 bits a channel
are scaled to 8; of an animation the first frame counts.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lcp_plugin.errors import DataError
from lcp_plugin.formats.disk import replacing
from lcp_plugin.telling.wording import agree, counted

LARGEST = 1_000_000_000  # pixels; a gigapixel is 3 GB in RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit refuses scans and panoramas; ours is LARGEST

READ = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".apng",
    ".dib", ".mpo", ".jp2", ".j2k", ".jpf", ".jpx", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi",
)  # fmt: skip
PLUGINS = {  # kind -> the module that teaches it to Pillow, and the package that it comes in
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".hif": ("pillow_heif", "pillow-heif"),
    ".avif": ("pillow_avif", "pillow-avif-plugin"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
OTHERS = (  # pictures that a folder of photographs may hold and that are not read
    ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".ai", ".ico", ".icns", ".dds", ".exr", ".hdr",
    ".pcx", ".sgi", ".fits", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".raf", ".rw2",
    ".pef", ".srw", ".raw",
)  # fmt: skip
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {  # its value -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # orientations that exchange the sides


# ------------------------------------------------------------------------------------- folders


@cache
def is_read(kind: str) -> bool:
    """Whether files with this ending (".jpg", lower case) are read on this machine."""
    if kind in READ or kind not in PLUGINS:
        return kind in READ
    with suppress(ImportError):
        plugin = importlib.import_module(PLUGINS[kind][0])
        with suppress(AttributeError):
            plugin.register_heif_opener()  # the others are ready once they are imported
    return Image.registered_extensions().get(kind) in Image.OPEN


def list_images(folder: Path) -> list[Path]:
    """Images directly in a folder, by name; hidden files are left out."""
    return [path for path in _files(folder) if is_read(path.suffix.lower())]


def list_left_out(folder: Path) -> list[Path]:
    """Files directly in a folder that are pictures too, but of kinds that are not read here."""
    kinds = {*PLUGINS, *OTHERS}
    found = [path for path in _files(folder) if path.suffix.lower() in kinds]
    return [path for path in found if not is_read(path.suffix.lower())]


def describe_left_out(folder: Path) -> str:
    """One sentence on what `list_left_out` finds; empty where it finds nothing."""
    found = list_left_out(folder)
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    names = ", ".join(path.name for path in found[:3]) + more
    kinds = sorted({path.suffix.lower() for path in found})
    packages = sorted({PLUGINS[kind][1] for kind in kinds if kind in PLUGINS})
    ways = [f"pip install {' '.join(packages)}"] if packages else []
    ways.append("save them as PNG or JPEG")
    return (
        f"{counted(len(found), 'picture')} {agree(len(found), 'is', 'are')} left out in {folder}, "
        f"of a kind that is not read here: {names}; {' or '.join(ways)} to use them."
    )


def _files(folder: Path) -> Iterator[Path]:
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    yield from sorted(found)


# ------------------------------------------------------------------------------------- reading


def read_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header only; `data`: its bytes, if known.

    Raises:
        DataError: not a picture, or one of more than `LARGEST` pixels.
    """
    with _opened(path, data) as image:
        width, height = image.size
        turned = _orientation(image) in _TURNED
    return (height, width) if turned else (width, height)


def open_upright(path: Path) -> Image.Image:
    """The decoded picture as a viewer turns it, in its own mode or 8 bits of it."""
    with _opened(path) as image:
        image.load()
        way = _UPRIGHT.get(_orientation(image))
        return _in_eight_bits(image if way is None else image.transpose(way))


def open_rgb(path: Path) -> Image.Image:
    """The upright picture as RGB, transparency laid on white. Raises DataError."""
    image = open_upright(path)
    with _refusing(path):
        return to_rgb(image)


def decode(path: Path, data: bytes) -> None:
    """Decodes a picture for the sake of its errors; JPEGs at an eighth. Raises DataError."""
    with _opened(path, data) as image:
        image.draft("RGB", (64, 64))
        image.load()


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: transparency over white, more bits scaled to 8."""
    if image.mode == "RGB":
        return image
    image = _in_eight_bits(image)
    if has_alpha(image):
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture has transparent pixels, or a colour that stands for them."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a channel and floating point scaled to 8 bits, where PIL would clip them."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    unit = image.mode == "F" and float(values.max(initial=0.0)) <= 1.0
    values = values * 255.0 if unit else values / 257.0 if image.mode[0] == "I" else values
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything, and the picture is whole all the same
        return 1


def save_picture(path: Path, image: Image.Image, facts: Mapping[str, str]) -> None:
    """A PNG with facts in its text chunks, whole or not at all; empty facts are left out."""
    info = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        if value:
            info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The picture with only its header read. Raises DataError, whatever its body raises."""
    is_read(path.suffix.lower())  # imports the plugin that the kind may need
    with _refusing(path), Image.open(path if data is None else io.BytesIO(data)) as image:
        width, height = image.size
        if width * height > LARGEST:
            raise DataError(
                f"image {path} has {width} x {height} pixels, above the {LARGEST:,} that are "
                "read; make it smaller or remove it."
            )
        yield image


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What decoders raise over damaged files, of which there is no end, as one line."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"image {path} cannot be read (not an image file); replace or remove it."
        ) from None
    except Exception as error:
        lines = (str(error) or type(error).__name__).splitlines()
        reason = lines[0].replace(str(path), "file")
        raise DataError(f"image {path} cannot be read ({reason}); replace or remove it.") from None
