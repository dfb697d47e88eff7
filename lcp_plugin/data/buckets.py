"""Aspect-ratio buckets: which size an image is trained at.

Rules as in kohya-ss/sd-scripts (library/train_util.py BucketManager, library/model_util.py
make_bucket_resolutions, at 48d368fa): sizes of at most the resolution's area whose sides are
multiples of the step; an image goes to the size of the nearest aspect ratio, is resized to cover it
and cropped. Without upscaling an image keeps its size unless its area is too large, and its sides
are cut down to multiples of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcp_plugin.config.datasets import DatasetConfig
from lcp_plugin.data.images import Size


@dataclass(frozen=True)
class Placement:
    """How an image comes to the size it is trained at; both sizes are (width, height)."""

    bucket: Size
    resized: Size  # covers the bucket

    @property
    def slack(self) -> Size:
        """Pixels that the crop takes away, (width, height)."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]


def list_bucket_sizes(resolution: Size, shortest: int, longest: int, step: int) -> list[Size]:
    """All sizes (width, height) of at most the resolution's area, sorted."""
    area = resolution[0] * resolution[1]
    square = int(math.sqrt(area)) // step * step
    sizes = {(square, square)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_size(image: Size, sizes: list[Size]) -> Placement:
    """The size of the nearest aspect ratio (the first of several), the image covering it."""
    aspect = image[0] / image[1]
    if image in sizes:
        bucket = image
    else:
        bucket = min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))
    return Placement(bucket, cover(image, bucket))


def cover(image: Size, bucket: Size) -> Size:
    """The smallest size in the image's aspect ratio that covers the bucket."""
    wider = image[0] / image[1] > bucket[0] / bucket[1]
    scale = bucket[1] / image[1] if wider else bucket[0] / image[0]
    width, height = (int(side * scale + 0.5) for side in image)
    return max(width, bucket[0]), max(height, bucket[1])


def choose_without_upscaling(image: Size, resolution: Size, step: int) -> Placement:
    """The image's own size, scaled down to the resolution's area, its sides cut to the step."""
    area = resolution[0] * resolution[1]
    resized = image
    if image[0] * image[1] > area:
        resized = _shrink_to_area(image[0] / image[1], area, step)
    bucket = (max(step, resized[0] // step * step), max(step, resized[1] // step * step))
    return Placement(bucket, resized if _covers(resized, bucket) else cover(image, bucket))


def _covers(size: Size, bucket: Size) -> bool:
    return size[0] >= bucket[0] and size[1] >= bucket[1]


def _shrink_to_area(aspect: float, area: int, step: int) -> Size:
    """One side a multiple of the step, the other from the aspect ratio; the truer of two ways."""
    width = math.sqrt(area * aspect)
    height = area / width
    by_width = _round_to(width, step)
    by_height = _round_to(height, step)
    error_by_width = abs(by_width / max(step, _round_to(by_width / aspect, step)) - aspect)
    error_by_height = abs(max(step, _round_to(by_height * aspect, step)) / by_height - aspect)
    if error_by_width < error_by_height:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _round_to(value: float, step: int) -> int:
    """Rounded to the nearest pixel, then down to a multiple of the step (at least one step)."""
    return max(step, int(value + 0.5) // step * step)


class Bucketing:
    """Places images of one data set; limits that the resolution breaks are widened."""

    def __init__(self, dataset: DatasetConfig, native: Size) -> None:
        self.resolution = dataset.resolution or native
        self._dataset = dataset
        shortest = min(dataset.min_bucket_reso, *self.resolution)
        longest = max(dataset.max_bucket_reso, *self.resolution)
        self._step = dataset.bucket_reso_steps
        while self._step > min(self.resolution) and self._step > 8:
            self._step = max(8, self._step // 2)
        self.widened = (shortest, longest, self._step) != (
            dataset.min_bucket_reso,
            dataset.max_bucket_reso,
            dataset.bucket_reso_steps,
        )
        self._sizes = [self.resolution]
        if dataset.enable_bucket and not dataset.bucket_no_upscale:
            self._sizes = list_bucket_sizes(self.resolution, shortest, longest, self._step)

    def place(self, image: Size) -> Placement:
        """The image's bucket and the size it is resized to."""
        if self._dataset.enable_bucket and self._dataset.bucket_no_upscale:
            return choose_without_upscaling(image, self.resolution, self._step)
        return choose_size(image, self._sizes)
