"""Batches of a task: pure functions of their index, with or without caches and workers."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lcp_plugin.config.datasets import DatasetConfig, SubsetConfig
from lcp_plugin.config.options import Options
from lcp_plugin.config.task_table import TaskConfig
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import DataError, NumericError

Make = Callable[..., TaskData]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
FROZEN_TEXT = {"network_train_unet_only": True}


def encode_images(pixels: Tensor) -> Tensor:
    """Stands for a VAE: 8 x 8 averages."""
    return functional.avg_pool2d(pixels, 8)


def encode_prompts(prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Stands for text encoders: the length of the text."""
    lengths = torch.tensor([float(len(p)) for p in prompts])
    return {
        "encoder_hidden_states": lengths.view(-1, 1, 1).expand(-1, 3, 2),
        "text_embeds": lengths.view(-1, 1).expand(-1, 2),
    }


def fill_folder(folder: Path, count: int, size: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(count)
    for i in range(count):
        pixels = noise.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A task's data over one folder of pictures."""

    def build(
        count: int = 5,
        subset: Mapping[str, Any] = {},  # noqa: B006
        dataset: Mapping[str, Any] = {},  # noqa: B006
        seed: int = 0,
        index: int = 1,
        cache_dir: Path | None = None,
        more: Sequence[SubsetConfig] = (),
        part: Any = "train",
        **options: Any,
    ) -> TaskData:
        folder = fill_folder(tmp_path / f"images{count}", count)
        given = {"class_tokens": "sks dog", **subset}
        subsets = (SubsetConfig(image_dir=folder, **given), *more)
        return TaskData(
            TaskConfig(
                name="t",
                kind="object",
                concept="sks dog",
                train_prompt="",
                eval_prompts=(),
                datasets=(DatasetConfig(subsets=subsets, **dataset),),
                options=Options(**{**FROZEN_TEXT, **options}),
            ),
            seed,
            index,
            (32, 32),
            cache_dir,
            part,
        )

    return build


def prepared(data: TaskData) -> TaskData:
    data.prepare(encode_images, encode_prompts, "vae", "text")
    return data


def equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)


def test_an_epoch_holds_every_image_as_often_as_it_repeats(make: Make) -> None:
    data = make(5, {"num_repeats": 3}, {"batch_size": 4})
    assert (data.num_images, data.num_repeated_images, data.num_batches_per_epoch) == (5, 15, 4)
    for epoch in range(2):
        seen = Counter(e.path.name for k in range(4) for e in data.examples_of(4 * epoch + k))
        assert set(seen.values()) == {3}
        sizes = sorted(len(data.examples_of(4 * epoch + k)) for k in range(4))
        assert sizes == [3, 4, 4, 4]


def test_the_order_differs_between_epochs_seeds_and_tasks(make: Make) -> None:
    def order(data: TaskData, start: int = 0) -> list[str]:
        return [e.path.name for k in range(8) for e in data.examples_of(start + k)]

    first = order(make(8))
    others = [order(make(8), 8), order(make(8, seed=1)), order(make(8, index=2))]
    assert all(sorted(other) == sorted(first) for other in others)
    assert all(other != first for other in others)


def test_a_batch_is_a_pure_function_of_its_index(make: Make) -> None:
    given: dict[str, Any] = {
        "subset": {
            "flip_aug": True,
            "random_crop": True,
            "color_aug": True,
            "shuffle_caption": True,
            "class_tokens": "a, b, c, d, e",
        },
        "dataset": {"batch_size": 2},
    }
    one, two = make(**given), make(**given)
    backwards = {k: two.batch(k) for k in reversed(range(9))}
    torch.manual_seed(123)  # the global generator does not matter
    assert all(equal(one.batch(k), backwards[k]) for k in range(9))
    assert len({tuple(one.batch(k)["captions"]) for k in range(9)}) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_does_not_matter(make: Make, workers: int) -> None:
    data = make(subset={"flip_aug": True, "random_crop": True})
    state = torch.get_rng_state()
    loaded = list(data.loader(2, 9, workers, stride=2, offset=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loaded) == 3  # batches 3, 5 and 7
    expected = [data.batch(k) for k in (3, 5, 7)]
    assert all(equal(a, b) for a, b in zip(loaded, expected, strict=True))


def test_a_worker_may_be_spawned_as_windows_and_macos_do(make: Make) -> None:
    """It gets the task's data pickled, and makes the same batches of them."""
    data = make()
    again: TaskData = pickle.loads(pickle.dumps(data))
    assert equal(again.batch(3), data.batch(3))


def test_cached_latents_are_the_encoded_pixels(make: Make) -> None:
    live, cached = make(**FROZEN_TEXT), prepared(make(**CACHED))
    for k in range(5):
        pixels, latents = live.batch(k)["pixels"], cached.batch(k)["latents"]
        torch.testing.assert_close(latents, encode_images(pixels))


def test_flipped_latents_are_those_of_the_mirrored_image(make: Make) -> None:
    subset = {"flip_aug": True}
    live, cached = make(subset=subset), prepared(make(subset=subset, **CACHED))
    plain = make()
    mirrored = 0
    for k in range(20):
        pixels = live.batch(k)["pixels"]
        torch.testing.assert_close(cached.batch(k)["latents"], encode_images(pixels))
        mirrored += not torch.equal(pixels, plain.batch(k)["pixels"])
    assert 4 <= mirrored <= 16


def test_cached_text_is_that_of_the_batchs_captions(make: Make) -> None:
    data = prepared(make(**CACHED))
    batch = data.batch(0)
    assert "captions" not in batch
    assert batch["text_embeds"].tolist() == [[7.0, 7.0]]  # len("sks dog")
    assert batch["encoder_hidden_states"].shape == (1, 3, 2)


def test_dropped_captions_use_the_cached_empty_text(make: Make) -> None:
    data = prepared(make(subset={"caption_dropout_rate": 0.5}, **CACHED))
    lengths = Counter(float(data.batch(k)["text_embeds"][0, 0]) for k in range(40))
    assert set(lengths) == {0.0, 7.0}
    assert 8 <= lengths[0.0] <= 32


def test_size_conditioning_holds_original_crop_and_target_sizes(make: Make) -> None:
    # 48 x 40 (width x height) on 32 x 32: resized to 38 x 32, so 6 columns go, 3 at the left
    assert make().batch(0)["time_ids"].tolist() == [[40, 48, 0, 3, 32, 32]]


def test_random_crops_stay_inside_and_are_told_to_the_model(make: Make) -> None:
    data = make(subset={"random_crop": True})
    lefts = {int(data.batch(k)["time_ids"][0, 3]) for k in range(60)}
    assert lefts == set(range(7))


def test_random_crops_set_the_latent_cache_aside_with_a_notice(make: Make) -> None:
    data = prepared(make(subset={"random_crop": True}, **CACHED))
    assert data.needs_vae
    assert "pixels" in data.batch(0)
    assert any("cache_latents is set aside" in n for n in data.notices)


@pytest.mark.parametrize(
    ("subset", "options"),
    [
        ({"shuffle_caption": True}, {}),
        ({"enable_wildcard": True}, {}),
        ({"caption_tag_dropout_rate": 0.1}, {}),
        ({"token_warmup_step": 5}, {}),
        ({}, {"network_train_unet_only": False}),
    ],
)
def test_changing_captions_set_the_text_cache_aside_with_a_notice(
    make: Make, subset: dict[str, Any], options: dict[str, Any]
) -> None:
    data = prepared(make(subset=subset, **{**CACHED, **options}))
    assert data.needs_text_encoders
    assert len(data.batch(0)["captions"]) == 1
    assert any("cache_text_encoder_outputs is set aside" in n for n in data.notices)


def test_regularisation_images_carry_the_prior_loss_weight(make: Make, tmp_path: Path) -> None:
    reg = SubsetConfig(image_dir=fill_folder(tmp_path / "reg", 2), is_reg=True)
    data = make(3, more=[reg], prior_loss_weight=0.25, dataset={"batch_size": 6})
    assert data.num_images == 3
    assert data.num_reg_images == 2
    weights = Counter(data.batch(0)["loss_weights"].tolist())
    assert weights == {1.0: 3, 0.25: 3}


def test_masks_follow_flips_and_crops(make: Make, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(2):
        mask = Image.new("L", (48, 40), 0)
        mask.paste(255, (0, 0, 24, 40))  # the left half counts
        mask.save(masks / f"{i}.png")
    data = make(2, {"conditioning_data_dir": masks, "flip_aug": True})
    sides = set()
    for k in range(12):
        mask = data.batch(k)["masks"]
        assert mask.shape == (1, 1, 32, 32)
        sides.add((round(float(mask[..., :10].mean())), round(float(mask[..., -10:].mean()))))
    assert sides == {(1, 0), (0, 1)}


def test_transparency_weighs_the_loss_and_opaque_images_count_fully(
    make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "alpha"
    folder.mkdir()
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(folder / "a.png")
    alpha = SubsetConfig(image_dir=folder, alpha_mask=True)
    data = make(1, {"alpha_mask": True}, {"batch_size": 2}, more=[alpha])
    assert sorted(data.batch(0)["masks"].mean(dim=(1, 2, 3)).tolist()) == [0.0, 1.0]


def test_output_preservation_is_marked(make: Make) -> None:
    data = make(subset={"custom_attributes": {"diff_output_preservation": True}})
    assert data.batch(0)["preserve"].tolist() == [True]
    assert "preserve" not in make().batch(0)


def test_the_fingerprint_follows_contents_not_paths(make: Make, tmp_path: Path) -> None:
    data = make(3)
    moved = tmp_path / "moved"
    (tmp_path / "images3").rename(moved)
    subset = SubsetConfig(image_dir=moved, class_tokens="sks dog")
    task = replace(data.task, datasets=(DatasetConfig(subsets=(subset,)),))
    assert TaskData(task, 0, 1, (32, 32)).fingerprint == data.fingerprint
    Image.new("RGB", (48, 40), "red").save(moved / "0.png")
    assert TaskData(task, 0, 1, (32, 32)).fingerprint != data.fingerprint


def test_the_fingerprint_follows_captions_and_repeats(make: Make) -> None:
    prints = [
        make(3).fingerprint,
        make(3, {"class_tokens": "zwz dog"}).fingerprint,
        make(3, {"num_repeats": 2}).fingerprint,
    ]
    assert len(set(prints)) == 3


def test_the_disk_cache_is_used_again_and_keyed_by_the_vae(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **CACHED,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs_to_disk": True,
        "cache_dir": tmp_path / "cache",
    }
    calls = Counter[str]()

    def images(pixels: Tensor) -> Tensor:
        calls["images"] += len(pixels)
        return encode_images(pixels)

    def prompts(texts: Sequence[str]) -> Mapping[str, Tensor]:
        calls["prompts"] += len(texts)
        return encode_prompts(texts)

    first = make(**options)
    first.prepare(images, prompts, "vae", "text")
    second = make(**options)
    second.prepare(images, prompts, "vae", "text")
    assert calls == {"images": 5, "prompts": 1}
    assert equal(first.batch(3), second.batch(3))
    make(**options).prepare(images, prompts, "another vae", "other text encoders")
    assert calls == {"images": 10, "prompts": 2}


def test_another_resolution_does_not_meet_the_old_latents(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **CACHED, "cache_latents_to_disk": True, "cache_dir": tmp_path / "cache"
    }  # fmt: skip
    prepared(make(**options))
    small = prepared(make(dataset={"resolution": (16, 16)}, **options))
    assert small.batch(0)["latents"].shape == (1, 3, 2, 2)


def test_an_encoder_that_gives_nan_is_refused_and_nothing_is_cached(
    make: Make, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        **CACHED, "cache_latents_to_disk": True, "cache_dir": tmp_path / "cache"
    }  # fmt: skip
    data = make(**options)
    with pytest.raises(NumericError, match="no_half_vae"):
        data.prepare(lambda x: encode_images(x) * float("nan"), None, "vae", "text")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_several_images_are_encoded_at_once_on_request(make: Make) -> None:
    sizes = []

    def images(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return encode_images(pixels)

    make(vae_batch_size=2, **CACHED).prepare(images, None, "vae", "text")
    assert sizes == [2, 2, 1]


def test_epochs_beat_steps_and_accumulation_divides_them(make: Make) -> None:
    data = make(5, {"num_repeats": 2}, max_train_epochs=3, gradient_accumulation_steps=4)
    assert data.steps_per_epoch() == 3  # 10 batches, 4 a step
    assert data.total_steps() == 9
    assert data.total_steps(processes=2) == 6
    assert make(max_train_steps=7).total_steps() == 7


def test_a_validation_part_has_the_held_out_images(make: Make) -> None:
    split = {"validation_split": 0.4}
    train, held = make(5, dataset=split), make(5, dataset=split, part="validation")
    assert (train.num_images, held.num_images) == (3, 2)
    assert not set(train.image_paths) & set(held.image_paths)


def test_a_task_without_images_is_refused(make: Make) -> None:
    data = make(1)
    task = replace(data.task, datasets=())
    with pytest.raises(DataError, match="'t' has no images"):
        TaskData(task, 0, 1, (32, 32))


def test_tags_warm_up_by_optimizer_steps_on_any_number_of_processes(make: Make) -> None:
    given = {"token_warmup_step": 4, "token_warmup_min": 1, "caption_extension": ".txt"}
    data = make(1, given, max_train_steps=8)
    (data.image_paths[0].with_suffix(".txt")).write_text("a, b, c, d, e", encoding="utf-8")
    data = make(1, given, max_train_steps=8)
    alone = [batch["captions"] for batch in data.loader(0, 8, 0)]
    for rank in (0, 1):
        beside = [batch["captions"] for batch in data.loader(0, 16, 0, stride=2, offset=rank)]
        assert beside == alone
    assert alone[0] == ["a"]
    assert alone[4] == ["a, b, c, d, e"]
