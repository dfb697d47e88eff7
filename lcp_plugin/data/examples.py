"""A task's images as they will be trained: listed, captioned, placed in buckets, repeated.

Repeats, and the balancing of regularisation images with training images, follow kohya-ss/sd-scripts
(library/train_util.py DreamBoothDataset, at 48d368fa).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lcp_plugin.config.datasets import DatasetConfig, SubsetConfig
from lcp_plugin.data.buckets import Bucketing, Placement
from lcp_plugin.data.captions import CaptionSettings, read_caption, read_metadata
from lcp_plugin.data.contents import check_pictures, read_contents
from lcp_plugin.data.images import Size
from lcp_plugin.errors import DataError
from lcp_plugin.formats.pictures import describe_left_out, list_images
from lcp_plugin.seeds import derive_seed
from lcp_plugin.telling.wording import agree, counted

_CAPTION_KINDS = (".txt", ".caption")  # what tools name caption files
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Example:
    """One image under one subset's rules."""

    path: Path
    subset: SubsetConfig
    caption_settings: CaptionSettings
    caption: str  # as read, before captions.process_caption
    size: Size  # of the upright image, (width, height)
    placement: Placement
    repeats: int
    content: str  # sha256 of the file, and of its mask
    mask: Path | None = None


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one data set, and what the user should know of them."""

    examples: tuple[Example, ...]
    batch_size: int
    notices: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...] = ()  # of each subset; of regularisation images all

    def buckets(self) -> dict[Size, list[int]]:
        """Bucket -> indices of examples, each as often as it repeats, in order."""
        found: dict[Size, list[int]] = {}
        for index, example in enumerate(self.examples):
            found.setdefault(example.placement.bucket, []).extend([index] * example.repeats)
        return dict(sorted(found.items()))

    def num_batches(self) -> int:
        """Batches of an epoch: every bucket ends with a batch of its own, maybe a partial one."""
        return sum(math.ceil(len(b) / self.batch_size) for b in self.buckets().values())


def collect_examples(
    dataset: DatasetConfig, native: Size, part: Split, default_seed: int
) -> ExampleSet:
    """The examples of a data set. Raises DataError for images and captions that cannot be read."""
    bucketing = Bucketing(dataset, native)
    notices: list[str] = []
    if bucketing.widened and dataset.enable_bucket and not dataset.bucket_no_upscale:
        notices.append(
            f"bucket limits are fitted to the resolution {bucketing.resolution[0]}x"
            f"{bucketing.resolution[1]} (min_bucket_reso, max_bucket_reso, bucket_reso_steps)."
        )
    seed = default_seed if dataset.validation_seed is None else dataset.validation_seed
    examples: list[Example] = []
    listed: list[tuple[str, ...]] = []
    for subset in dataset.subsets:
        captions, told = _captions_of(subset)
        captions = _large_enough(captions, dataset.skip_image_resolution)
        notices += told
        chosen = _split(list(captions), dataset.validation_split, seed, part)
        if subset.is_reg:
            chosen = [] if part == "validation" else list(captions)
        listed.append(tuple(captions[path] for path in chosen))
        settings = CaptionSettings.of(subset)
        for path, mask in _masks_of(chosen, subset).items():
            size, content = _look_at(path, mask)
            examples.append(
                Example(
                    path=path,
                    subset=subset,
                    caption_settings=settings,
                    caption=captions[path],
                    size=size,
                    placement=bucketing.place(size),
                    repeats=subset.num_repeats,
                    content=content,
                    mask=mask,
                )
            )
    kept = tuple(_balance(examples))
    return ExampleSet(kept, dataset.batch_size, tuple(notices), tuple(listed))


def check_images(datasets: Iterable[DatasetConfig]) -> None:
    """Decodes every image and mask, those that validation holds out too.

    Raises:
        DataError: naming those that cannot be read (five at most), or what is missing.
    """
    paths: list[Path] = []
    for subset in (subset for dataset in datasets for subset in dataset.subsets):
        for path, mask in _masks_of(list(_captions_of(subset)[0]), subset).items():
            paths += [path] if mask is None else [path, mask]
    check_pictures(paths)


def _large_enough(captions: dict[Path, str], skipped: Size | None) -> dict[Path, str]:
    """The images of more pixels than `skipped` has (sd-scripts#2273)."""
    if skipped is None:
        return captions
    least = math.prod(skipped)
    return {p: c for p, c in captions.items() if math.prod(read_contents(p).size) > least}


def _look_at(path: Path, mask: Path | None) -> tuple[Size, str]:
    """An image's size, and the sha256 of its contents and its mask's."""
    contents = read_contents(path)
    if mask is None:
        return contents.size, contents.digest
    both = contents.digest + read_contents(mask).digest
    return contents.size, hashlib.sha256(both.encode()).hexdigest()


def _masks_of(paths: Sequence[Path], subset: SubsetConfig) -> dict[Path, Path | None]:
    """Image -> the mask of its name in conditioning_data_dir; None without such a folder."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return dict.fromkeys(paths)
    masks = {p.stem: p for p in reversed(list_images(folder))} if folder.is_dir() else {}
    missing = next((path for path in paths if path.stem not in masks), None)
    if missing is not None:
        raise DataError(f"no mask image for {missing} in {folder}; add {missing.stem}.png.")
    return {path: masks[path.stem] for path in paths}


def _captions_of(subset: SubsetConfig) -> tuple[dict[Path, str], list[str]]:
    """Image -> caption text of a subset, and notices."""
    if subset.metadata_file is not None:
        return _captions_of_metadata(subset, subset.metadata_file), []
    images = list_images(subset.image_dir)
    left_out = describe_left_out(subset.image_dir)
    if not images:
        raise DataError(f"{subset.image_dir} holds no images; put some there. {left_out}".strip())
    notices = [left_out] if left_out else []
    ending = subset.caption_extension
    ending = ending if ending.startswith(".") else f".{ending}"
    has_own = any(image.with_suffix(ending).is_file() for image in images)
    if ending == ".caption" and not has_own:
        if any(image.with_suffix(".txt").is_file() for image in images):
            ending = ".txt"
            notices.append(
                f"captions of {subset.image_dir} are read from .txt files, since there are no "
                f".caption files; caption_extension = '.txt' says so."
            )
    captions = {image: _caption_of(image, ending, subset) for image in images}
    notices += _tell_of_files(images, ending, subset)
    bare = sum(not text for text in captions.values())
    if bare:
        notices.append(
            f"{bare} of {counted(len(images), 'image')} in {subset.image_dir} "
            f"{agree(bare, 'has', 'have')} no caption (no {ending} file, no class "
            "tokens); what has none is trained with an empty one."
        )
    return captions, notices


def _tell_of_files(images: Sequence[Path], ending: str, subset: SubsetConfig) -> list[str]:
    """Notices of images without a caption file beside others that have one, and of caption files
    that are not read for their name's sake.
    """
    lacking = sum(not image.with_suffix(ending).is_file() for image in images)
    if 0 < lacking < len(images) and subset.class_tokens:
        return [
            f"{lacking} of {counted(len(images), 'image')} in {subset.image_dir} "
            f"{agree(lacking, 'has', 'have')} no {ending} file; what has none is trained with "
            f"{subset.class_tokens!r}."
        ]
    names = {name for image in images for name in (image.stem, image.name)}
    texts = [p for p in subset.image_dir.iterdir() if p.suffix.lower() in _CAPTION_KINDS]
    unread = sorted(p.name for p in texts if p.stem in names) if lacking == len(images) else []
    if not unread:
        return []
    return [
        f"{counted(len(unread), 'caption file')} in {subset.image_dir} "
        f"{agree(len(unread), 'is', 'are')} not read ({unread[0]}): wanted "
        f"{images[0].with_suffix(ending).name} (caption_extension = {ending!r})."
    ]


def _caption_of(image: Path, ending: str, subset: SubsetConfig) -> str:
    path = image.with_suffix(ending)
    text = read_caption(path) if path.is_file() else ""
    return text or subset.class_tokens or ""


def _captions_of_metadata(subset: SubsetConfig, path: Path) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    by_stem = {p.stem: p for p in list_images(subset.image_dir)} if subset.image_dir else {}
    for key, caption in read_metadata(path).items():
        image = next((p for p in (Path(key), subset.image_dir / key) if p.is_file()), None)
        image = image or by_stem.get(Path(key).stem)
        if image is None:
            raise DataError(f"{path} names the image {key!r}, which is not in {subset.image_dir}.")
        captions[image] = caption
    if not captions:
        raise DataError(f"{path} names no images.")
    return captions


def _split(paths: Sequence[Path], share: float, seed: int, part: Split) -> list[Path]:
    """The images of a part; at least one stays for training."""
    if share <= 0:
        return list(paths) if part == "train" else []
    order = list(paths)
    random.Random(derive_seed(seed, "validation")).shuffle(order)
    kept = max(1, math.ceil(len(order) * (1 - share)))
    return sorted(order[:kept] if part == "train" else order[kept:])


def _balance(examples: list[Example]) -> list[Example]:
    """Regularisation images repeated, or cut off, to as many as there are training images."""
    training = [e for e in examples if not e.subset.is_reg]
    regular = [e for e in examples if e.subset.is_reg]
    wanted = sum(e.repeats for e in training)
    counts: Mapping[int, int] = _spread([e.repeats for e in regular], wanted)
    kept = [replace(e, repeats=counts[i]) for i, e in enumerate(regular) if counts.get(i)]
    return training + kept


def _spread(repeats: Sequence[int], wanted: int) -> dict[int, int]:
    """How often each regularisation image is used: its repeats first, then one more in turn.

    An image's own repeats are kept whole, so the sum may go beyond `wanted` by less than one of
    them, as with kohya.
    """
    counts: dict[int, int] = {}
    total, first_round = 0, True
    while total < wanted and repeats:
        for index, own in enumerate(repeats):
            added = own if first_round else 1
            counts[index] = counts.get(index, 0) + added
            total += added
            if total >= wanted:
                break
        first_round = False
    return counts
