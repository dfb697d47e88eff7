"""Which images are trained, how often and with which captions, by hand-worked cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcp_plugin.config.datasets import DatasetConfig, SubsetConfig
from lcp_plugin.data.examples import collect_examples
from lcp_plugin.errors import DataError

Make = Callable[..., SubsetConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A folder of `count` pictures as a subset."""

    def build(
        name: str, count: int, size: tuple[int, int] = (32, 32), **given: Any
    ) -> SubsetConfig:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (i, 0, len(name))).save(folder / f"{i}.png")
        return SubsetConfig(image_dir=folder, **given)

    return build


def collect(*subsets: SubsetConfig, part: Any = "train", **given: Any) -> Any:
    dataset = DatasetConfig(subsets=subsets, **given)
    return collect_examples(dataset, (32, 32), part, default_seed=0)


def test_repeats_are_counted_before_batches_are_made(make: Make) -> None:
    one = collect(make("a", 3, num_repeats=4), make("b", 1), batch_size=5)
    assert [e.repeats for e in one.examples] == [4, 4, 4, 1]
    assert one.num_batches() == 3  # 13 images of one bucket in batches of 5


def test_every_bucket_ends_with_a_batch_of_its_own(make: Make) -> None:
    wide = make("a", 3, (64, 16), num_repeats=1)
    square = make("b", 5, (32, 32))
    given = {"enable_bucket": True, "min_bucket_reso": 16, "bucket_reso_steps": 16}
    one = collect(wide, square, batch_size=2, **given)
    assert {size: len(found) for size, found in one.buckets().items()} == {(32, 32): 5, (64, 16): 3}
    assert one.num_batches() == 3 + 2


@pytest.mark.parametrize(
    ("reg_images", "reg_repeats", "expected"),
    [
        (2, 1, [3, 3]),  # 6 training images: 2 + 1 + 1 + 1 + 1
        (4, 1, [2, 2, 1, 1]),
        (9, 1, [1] * 6),  # the last three are not used
        (3, 2, [2, 2, 2]),
        (2, 4, [4, 4]),  # an image's own repeats stay whole
    ],
)
def test_regularisation_images_are_balanced_with_training_images(
    make: Make, reg_images: int, reg_repeats: int, expected: list[int]
) -> None:
    train = make("train", 3, num_repeats=2)
    reg = make("reg", reg_images, is_reg=True, num_repeats=reg_repeats)
    found = collect(train, reg).examples
    assert [e.repeats for e in found if e.subset.is_reg] == expected


def test_a_caption_file_beats_the_class_tokens(make: Make) -> None:
    subset = make("a", 2, class_tokens="sks dog", caption_extension=".txt")
    (subset.image_dir / "0.txt").write_text("a brown dog")
    one = collect(subset)
    assert [e.caption for e in one.examples] == ["a brown dog", "sks dog"]
    assert "1 of 2 images" in one.notices[0]
    assert "is trained with 'sks dog'" in one.notices[0]


@pytest.mark.parametrize("name", ["0.TXT", "0.png.txt", "0.caption"])
def test_captions_under_other_names_are_told_of(make: Make, name: str) -> None:
    subset = make("a", 1, class_tokens="sks dog", caption_extension=".txt")
    (subset.image_dir / name).write_text("a brown dog")
    one = collect(subset)
    if (subset.image_dir / "0.txt").is_file():  # a file system that knows no capital letters
        assert one.examples[0].caption == "a brown dog"
    else:
        assert f"1 caption file in {subset.image_dir} is not read ({name})" in one.notices[0]


def test_txt_files_stand_in_for_missing_caption_files(make: Make) -> None:
    subset = make("a", 1)
    (subset.image_dir / "0.txt").write_text("from txt")
    one = collect(subset)
    assert one.examples[0].caption == "from txt"
    assert "caption_extension = '.txt'" in one.notices[0]


def test_txt_files_are_left_alone_where_caption_files_exist(make: Make) -> None:
    subset = make("a", 2, class_tokens="x")
    (subset.image_dir / "0.caption").write_text("from caption")
    (subset.image_dir / "1.txt").write_text("from txt")
    assert [e.caption for e in collect(subset).examples] == ["from caption", "x"]


def test_images_without_any_caption_are_told_of(make: Make) -> None:
    one = collect(make("a", 2))
    assert [e.caption for e in one.examples] == ["", ""]
    assert "2 of 2 images" in one.notices[0]


def test_metadata_names_images_and_captions(make: Make, tmp_path: Path) -> None:
    subset = make("a", 3)
    file = tmp_path / "meta.json"
    file.write_text('{"0": {"caption": "first"}, "2.png": {"tags": "third"}}')
    found = collect(SubsetConfig(image_dir=subset.image_dir, metadata_file=file)).examples
    assert [(e.path.name, e.caption) for e in found] == [("0.png", "first"), ("2.png", "third")]


def test_metadata_of_a_missing_image_is_refused(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    file.write_text('{"nowhere": {"caption": "x"}}')
    subset = make("a", 1)
    with pytest.raises(DataError, match="'nowhere'"):
        collect(SubsetConfig(image_dir=subset.image_dir, metadata_file=file))


def test_masks_are_found_by_name_and_missing_ones_refused(make: Make) -> None:
    masks = make("masks", 1)
    found = collect(make("a", 1, conditioning_data_dir=masks.image_dir)).examples
    assert found[0].mask == masks.image_dir / "0.png"
    with pytest.raises(DataError, match=r"no mask image for .*1\.png"):
        collect(make("b", 2, conditioning_data_dir=masks.image_dir))


def test_validation_images_are_never_trained_on(make: Make) -> None:
    subset = make("a", 10)
    train = collect(subset, validation_split=0.3).examples
    held = collect(subset, validation_split=0.3, part="validation").examples
    assert (len(train), len(held)) == (7, 3)
    assert not {e.path for e in train} & {e.path for e in held}
    again = collect(subset, validation_split=0.3, part="validation").examples
    assert [e.path for e in held] == [e.path for e in again]


def test_at_least_one_image_stays_for_training(make: Make) -> None:
    assert len(collect(make("a", 1), validation_split=0.9).examples) == 1


def test_an_unreadable_image_is_named_at_once(make: Make) -> None:
    subset = make("a", 1)
    (subset.image_dir / "bad.jpg").write_bytes(b"?")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        collect(subset)
