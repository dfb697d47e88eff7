"""Bucket choice by hand-worked cases from the documented rules."""

from __future__ import annotations

import pytest

from lcp_plugin.config.datasets import DatasetConfig
from lcp_plugin.data.buckets import (
    Bucketing,
    Placement,
    choose_size,
    choose_without_upscaling,
    cover,
    list_bucket_sizes,
)


def place(image: tuple[int, int], **given: object) -> Placement:
    dataset = DatasetConfig(subsets=(), enable_bucket=True, **given)  # type: ignore[arg-type]
    return Bucketing(dataset, (1024, 1024)).place(image)


def test_sizes_of_a_small_resolution_are_those_worked_out_by_hand() -> None:
    # area 256 * 256 = 65536; 128 x 512 has exactly that area, 192 -> 341 -> 320, 320 -> 204 -> 192
    # 384 -> 170 -> 128, 448 -> 146 -> 128; and each also standing upright
    upright = {(128, 384), (128, 448), (128, 512), (192, 320)}
    expected = upright | {(height, width) for width, height in upright} | {(256, 256)}
    assert list_bucket_sizes((256, 256), 128, 512, 64) == sorted(expected)


def test_no_size_exceeds_the_area_and_all_are_multiples_of_the_step() -> None:
    for width, height in list_bucket_sizes((1024, 1024), 256, 2048, 64):
        assert width * height <= 1024 * 1024
        assert width % 64 == height % 64 == 0
        assert min(width, height) >= 256
        assert max(width, height) <= 2048


def test_sdxls_usual_sizes_are_among_them() -> None:
    sizes = list_bucket_sizes((1024, 1024), 512, 2048, 64)
    for size in [(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640)]:
        assert size in sizes


def test_a_square_image_gets_the_square() -> None:
    assert place((3000, 3000)) == Placement((1024, 1024), (1024, 1024))


def test_a_three_by_two_image_gets_the_nearest_aspect_ratio() -> None:
    # 3:2 = 1.5; 1216/832 = 1.4615, 1280/768 = 1.667, 1344/768 = 1.75: 1216 x 832 is nearest
    placed = place((3000, 2000), max_bucket_reso=2048)
    assert placed.bucket == (1216, 832)
    # the image is wider, so heights match: 832 * 1.5 = 1248
    assert placed.resized == (1248, 832)
    assert placed.slack == (32, 0)


def test_an_image_of_a_buckets_own_size_is_not_touched() -> None:
    assert place((832, 1216), max_bucket_reso=2048) == Placement((832, 1216), (832, 1216))


def test_without_buckets_all_images_get_the_resolution() -> None:
    bucketing = Bucketing(DatasetConfig(subsets=(), resolution=(512, 768)), (1024, 1024))
    # 1000 x 1000 on 512 x 768: the image is wider, heights match
    assert bucketing.place((1000, 1000)) == Placement((512, 768), (768, 768))


def test_the_bases_native_size_holds_where_no_resolution_is_named() -> None:
    bucketing = Bucketing(DatasetConfig(subsets=()), (96, 96))
    assert bucketing.place((1000, 500)) == Placement((96, 96), (192, 96))


def test_limits_are_widened_to_hold_the_resolution() -> None:
    bucketing = Bucketing(DatasetConfig(subsets=(), enable_bucket=True), (96, 96))
    assert bucketing.widened
    assert bucketing.place((100, 100)).bucket in [(64, 64), (96, 96)]


def test_without_upscaling_a_small_image_keeps_its_size_cut_to_the_step() -> None:
    placed = choose_without_upscaling((700, 500), (1024, 1024), 64)
    assert placed == Placement((640, 448), (700, 500))


def test_without_upscaling_a_large_image_shrinks_to_the_area() -> None:
    # 3000 x 2000: aspect 1.5; width sqrt(1048576 * 1.5) = 1254.1 -> 1216, height 836.1 -> 832.
    # by width 1216 / round_down(811) 768 = 1.583; by height round_down(1248) 1216 / 832 = 1.4615:
    # errors .083 and .0385, so the height is kept: 832, and 832 * 1.5 = 1248 wide
    placed = choose_without_upscaling((3000, 2000), (1024, 1024), 64)
    assert placed == Placement((1216, 832), (1248, 832))


def test_a_tiny_image_still_gets_one_step() -> None:
    placed = choose_without_upscaling((40, 100), (1024, 1024), 64)
    assert placed.bucket == (64, 64)
    assert placed.resized == (64, 160)


@pytest.mark.parametrize(
    ("image", "bucket", "expected"),
    [
        ((200, 100), (64, 64), (128, 64)),
        ((100, 200), (64, 64), (64, 128)),
        ((7, 5), (7, 5), (7, 5)),
    ],
)
def test_an_image_covers_its_bucket(
    image: tuple[int, int], bucket: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert cover(image, bucket) == expected


def test_the_first_of_equally_near_sizes_is_taken() -> None:
    # 2:1 lies between 1:1 and 3:1
    assert choose_size((200, 100), [(64, 64), (192, 64)]).bucket == (64, 64)
