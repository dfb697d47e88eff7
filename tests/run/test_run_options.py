"""Options that only a run shows, and that no other test looks at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.errors import LcpError
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.run import follow_up
from lcp_plugin.sdxl import live_base
from lcp_plugin.sdxl.drawing import DrawSettings
from lcp_plugin.sdxl.precision import Precision

Train = Callable[..., Any]
WriteConfig = Callable[..., Path]


def losses_of(run: Any) -> list[float]:
    return [step["loss"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


def test_another_vae_encodes_the_images_and_is_named(
    train: Train, toy_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other_vae"
    shutil.copytree(toy_base / "vae", other)
    (weights,) = other.glob("*.safetensors")
    tensors = read_tensors(weights)
    tensors["encoder.conv_in.weight"] = -tensors["encoder.conv_in.weight"]
    write_tensors(weights, tensors, {"format": "pt"})
    plain = train("plain", tasks=(0,), max_train_steps=1)
    run = train("run", tasks=(0,), max_train_steps=1, vae=str(other))
    assert losses_of(run) != losses_of(plain)
    header = read_header(run.store.deliverable).metadata
    assert header["ss_vae_name"] == "other_vae"


def test_full_fp16_and_full_bf16_are_the_factors_types() -> None:
    half = {"mixed_precision": "fp16", "full_fp16": True}
    assert Precision.of(Options(**half)).factors is torch.float16
    assert Precision.of(Options(mixed_precision="bf16", full_bf16=True)).factors is torch.bfloat16
    assert Precision.of(Options(mixed_precision="fp16")).factors is torch.float32


@pytest.mark.parametrize("workers", [0, 1])
def test_as_many_workers_read_images_as_max_data_loader_n_workers_says(
    train: Train, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    asked: list[int] = []
    loader = TaskData.loader

    def watched(self: TaskData, *args: Any, **given: Any) -> Any:
        asked.append(given["workers"])
        return loader(self, *args, **{**given, "workers": 0})

    monkeypatch.setattr(TaskData, "loader", watched)
    train("run", tasks=(0,), max_train_steps=1, max_data_loader_n_workers=workers)
    assert asked == [workers]


def test_caches_lie_in_cache_dir(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    given = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    train("run", tasks=(0,), max_train_steps=1, cache_dir=str(folder), **given)
    assert len([p for p in folder.rglob("*") if p.is_file()]) >= 3  # three pictures, a caption


def test_edited_captions_and_images_are_encoded_anew_and_others_are_not(
    write_config: WriteConfig, pictures: Path, tmp_path: Path
) -> None:
    flags = "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --caption_extension .txt"
    for i in range(3):
        (pictures / "disc0" / f"{i:02d}.txt").write_text(f"disc {i}")
    config = write_config("run", tasks=(0,))

    def encode() -> tuple[int, set[str]]:
        """How many images and which captions are encoded now."""
        task = load_config(["--config", str(config), *flags.split()]).tasks[0]
        images, texts = 0, set()

        def count_images(pixels: torch.Tensor) -> torch.Tensor:
            nonlocal images
            images += len(pixels)
            return torch.zeros(len(pixels), 4, 4, 4)

        def note_texts(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
            texts.update(prompts)
            count = len(prompts)
            return {
                "encoder_hidden_states": torch.ones(count, 77, 8),
                "text_embeds": torch.ones(count, 8),
            }

        data = TaskData(task, 0, 1, (32, 32), tmp_path / "cache")
        data.prepare(count_images, note_texts, "vae", "text")
        return images, texts - {""}

    assert encode() == (3, {"disc 0", "disc 1", "disc 2"})
    assert encode() == (0, set())
    (pictures / "disc0" / "01.txt").write_text("another disc")
    assert encode() == (0, {"another disc"})
    Image.new("RGB", (64, 64), "green").save(pictures / "disc0" / "02.png")
    assert encode() == (1, set())


def test_settings_of_samples_at_boundaries_reach_the_sampler(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, torch.Tensor]] = []
    draw = live_base.draw_images

    def watched(pipeline: Any, asked: Any, empty: Any, latents: Any, how: DrawSettings) -> Any:
        seen.append((how.steps, how.guidance, latents))
        return draw(pipeline, asked, empty, latents, replace(how, steps=1))

    monkeypatch.setattr(live_base, "draw_images", watched)
    common = {"tasks": (0,), "max_train_steps": 1, "samples_per_task": 2}
    first = train("one", sample_steps=3, guidance_scale=2.5, sample_seed=1, **common)
    assert len(list((first.store.root / "samples").rglob("*.png"))) >= 4  # base and task, two each
    assert {(steps, guidance) for steps, guidance, _ in seen} == {(3, 2.5)}
    latents = seen[0][2]
    seen.clear()
    train("two", sample_steps=3, guidance_scale=2.5, sample_seed=2, **common)
    assert not torch.equal(latents, seen[0][2])


def test_settings_of_the_scores_reach_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.evaluation import command

    asked: list[list[str]] = []
    monkeypatch.setattr(command, "run_command", lambda a: asked.append(list(a)) or "done")
    monkeypatch.setattr(follow_up, "write_report", lambda folder: folder / "report.html")
    options = Options(
        evaluate=("effnet", "clip_i"), evaluate_images=3, evaluate_prompts=2, guidance_scale=4.0
    )
    follow_up.close_run(tmp_path, options, "cpu")
    (arguments,) = asked
    pairs = dict(zip(arguments, arguments[1:], strict=False))
    assert arguments[1:4] == ["--metrics", "effnet", "clip_i"]
    assert (pairs["--images"], pairs["--prompts"], pairs["--guidance"]) == ("3", "2", "4.0")
    asked.clear()
    follow_up.close_run(tmp_path, Options(), "cpu")
    assert asked == []


@pytest.mark.parametrize(
    ("base", "device", "processes"),
    [("tiny-sdxl", "cpu", "3"), ("sdxl.safetensors", "cpu", "1"), ("tiny-sdxl", "cuda:0", "1")],
)
def test_scores_on_the_embedded_base_are_drawn_in_a_process_a_core(
    base: str, device: str, processes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.evaluation import command

    asked: list[str] = []
    monkeypatch.setattr(command, "run_command", lambda a: asked.extend(a) or "done")
    monkeypatch.setattr(follow_up, "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    options = Options(evaluate=("effnet",), pretrained_model_name_or_path=base)
    follow_up.close_run(tmp_path, options, device)
    assert asked[asked.index("--parallel") + 1] == processes


def test_a_run_lies_where_output_dir_and_output_name_say(train: Train, tmp_path: Path) -> None:
    run = train("mine", tasks=(0,), max_train_steps=1, output_dir=str(tmp_path / "there"))
    assert run.store.deliverable == tmp_path / "there" / "mine.safetensors"
    assert run.store.deliverable.is_file()
    named = train("x", tasks=(0,), max_train_steps=1, output_name="other name")
    assert named.store.deliverable.name == "other name.safetensors"


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_an_update_is_scaled_by_network_alpha_over_network_dim(train: Train, alpha: float) -> None:
    run = train("run", tasks=(0,), max_train_steps=1, network_dim=4, network_alpha=alpha)
    factors = run.store.folders()[0].read_adapter()
    assert {(f.rank, f.scale) for f in factors.values()} == {(4, alpha / 4)}


# ------------------------------------------------- kohya's rules for data set files, the rest


def data_of(tmp_path: Path, pictures: Path, text: str, *flags: str) -> Any:
    path = tmp_path / "data.toml"
    path.write_text(text.replace("DISC", str(pictures / "disc")))
    base = ["--pretrained_model_name_or_path", "x", "--dataset_config", str(path)]
    return load_config([*base, *flags])


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DISC0'\n"


def test_a_folders_name_gives_no_repeats_in_a_dataset_file(tmp_path: Path, pictures: Path) -> None:
    (pictures / "disc0").rename(pictures / "5_disc")
    text = SUBSET.replace("DISC0", str(pictures / "5_disc"))
    (subset,) = data_of(tmp_path, pictures, text).tasks[0].datasets[0].subsets
    assert (subset.num_repeats, subset.class_tokens) == (1, None)


def test_a_folder_counts_once_in_a_data_set_but_again_in_another(
    tmp_path: Path, pictures: Path
) -> None:
    twice = SUBSET + "[[datasets.subsets]]\nimage_dir = 'DISC0'\n" + SUBSET
    run = data_of(tmp_path, pictures, twice)
    assert [len(d.subsets) for d in run.tasks[0].datasets] == [1, 1]
    assert any("stands twice; used once" in notice for notice in run.notices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUBSET + "prior_loss_weight = 0.5\n", "unknown key 'prior_loss_weight'"),
        ("[[datasets]]\nresolution = 64\n", "wanted at least one \\[\\[datasets.subsets\\]\\]"),
        ("[extra]\n" + SUBSET, "unknown key 'extra'"),
        (SUBSET + "num_repeats = 0\n", "num_repeats = 0: wanted at least 1"),
        (
            SUBSET + "[[datasets.subsets]]\nimage_dir = 'DISC1'\nmetadata_file = 'DISC1/m.json'\n",
            "do not mix",
        ),
    ],
)
def test_what_kohya_refuses_in_a_dataset_file_is_one_line(
    tmp_path: Path, pictures: Path, text: str, message: str
) -> None:
    (pictures / "disc1" / "m.json").write_text('{"00": {"caption": "x"}}')
    with pytest.raises(LcpError, match=message) as caught:
        data_of(tmp_path, pictures, text)
    assert "\n" not in str(caught.value)


def test_a_whole_number_is_a_validation_split_too(tmp_path: Path, pictures: Path) -> None:
    text = "[general]\nvalidation_split = 0\n" + SUBSET
    (dataset,) = data_of(tmp_path, pictures, text, "--validation_split", "0.5").tasks[0].datasets
    assert dataset.validation_split == 0  # 0 counts as set, and beats the flag


@pytest.mark.parametrize("key", ["cache_info", "face_crop_aug_range", "network_multiplier"])
def test_a_key_of_a_data_set_without_effect_is_told_with_the_reason(
    tmp_path: Path, pictures: Path, key: str
) -> None:
    run = data_of(tmp_path, pictures, f"[general]\n{key} = 1\n" + SUBSET)
    (notice,) = [n for n in run.notices if n.startswith(key)]
    assert len(notice.split("has no effect here: ")[1]) > 20


def test_regularisation_images_are_repeated_to_as_many_as_are_trained(
    tmp_path: Path, pictures: Path
) -> None:
    reg = "[[datasets.subsets]]\nimage_dir = 'DISC1'\nis_reg = true\n"
    run = data_of(tmp_path, pictures, SUBSET + "num_repeats = 4\n" + reg)
    data = TaskData(run.tasks[0], 0, 1, (32, 32))
    assert data.num_images == data.num_reg_images == 3
    assert data.num_repeated_images == 12 + 12
