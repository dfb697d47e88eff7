"""Every ss_* key that sd-scripts writes (train_network.py at 48d368fa), on the four ways to give
data: the value it would have there, or why the file of that run does without.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_runs import draw_pictures

from lcp_plugin.cli import main
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.store.header_facts import facts_of_base, facts_of_vae

DOCUMENTED = """
ss_session_id ss_training_started_at ss_training_finished_at ss_output_name ss_learning_rate
ss_text_encoder_lr ss_unet_lr ss_num_train_images ss_num_validation_images ss_num_reg_images
ss_num_batches_per_epoch ss_num_epochs ss_epoch ss_steps
ss_gradient_checkpointing ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps
ss_lr_scheduler ss_network_module ss_network_dim ss_network_alpha ss_network_dropout
ss_network_args ss_mixed_precision ss_full_fp16 ss_v2
ss_base_model_version ss_clip_skip ss_max_token_length ss_cache_latents ss_seed ss_lowram
ss_noise_offset ss_noise_offset_random_strength ss_multires_noise_iterations
ss_multires_noise_discount ss_adaptive_noise_scale ss_zero_terminal_snr
ss_training_comment ss_sd_scripts_commit_hash ss_optimizer ss_max_grad_norm
ss_caption_dropout_rate ss_caption_dropout_every_n_epochs ss_caption_tag_dropout_rate
ss_face_crop_aug_range ss_prior_loss_weight ss_min_snr_gamma ss_scale_weight_norms
ss_ip_noise_gamma ss_ip_noise_gamma_random_strength ss_debiased_estimation ss_loss_type
ss_huber_schedule ss_huber_scale ss_huber_c ss_fp8_base ss_fp8_base_unet ss_validation_seed
ss_validation_split ss_max_validation_steps ss_validate_every_n_epochs ss_validate_every_n_steps
ss_resize_interpolation ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash ss_vae_name
ss_vae_hash ss_new_vae_hash
ss_datasets ss_tag_frequency ss_dataset_dirs
ss_batch_size_per_device ss_total_batch_size ss_resolution ss_color_aug ss_flip_aug
ss_random_crop ss_shuffle_caption ss_enable_bucket ss_bucket_no_upscale ss_min_bucket_reso
ss_max_bucket_reso ss_keep_tokens ss_reg_dataset_dirs ss_bucket_info
""".split()  # in the order of the reference

GIVEN = """
--network_dim 2 --network_alpha 1.5 --network_dropout 0.1 --network_args rank_dropout=0
--resolution 32 --samples_per_task 0 --seed 3 --learning_rate 1e-3 --unet_lr 2e-3
--text_encoder_lr 1e-4 --max_train_epochs 2 --gradient_accumulation_steps 2
--lr_scheduler constant_with_warmup --lr_warmup_steps 1 --optimizer_args weight_decay=0.1
--max_grad_norm 0.5 --noise_offset 0.05 --min_snr_gamma 5 --ip_noise_gamma 0.1
--debiased_estimation_loss --loss_type huber --huber_c 0.2 --prior_loss_weight 0.5
--scale_weight_norms 1 --caption_dropout_rate 0.25 --max_token_length 150 --cache_latents
--training_comment hello --caption_extension .txt
""".split()
SAID = {  # the same on every way: those options in Python's str(), and the defaults of the others
    "learning_rate": "0.001",
    "unet_lr": "0.002",
    "text_encoder_lr": "0.0001",
    "num_validation_images": "0",
    "num_epochs": "2",
    "epoch": "2",
    "gradient_checkpointing": "False",
    "gradient_accumulation_steps": "2",
    "lr_warmup_steps": "1",
    "lr_scheduler": "constant_with_warmup",
    "network_module": "networks.lora",
    "network_dropout": "0.1",
    "network_args": {"rank_dropout": "0"},
    "mixed_precision": "no",
    "full_fp16": "False",
    "v2": "False",
    "base_model_version": "sdxl_base_v1-0",
    "clip_skip": "None",
    "max_token_length": "150",
    "cache_latents": "True",
    "seed": "3",
    "lowram": "False",
    "noise_offset": "0.05",
    "noise_offset_random_strength": "False",
    "multires_noise_iterations": "None",
    "multires_noise_discount": "0.3",
    "adaptive_noise_scale": "None",
    "zero_terminal_snr": "False",
    "training_comment": "hello",
    "sd_scripts_commit_hash": "(none)",  # what sd-scripts says outside its own checkout
    "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,fused=True)",  # fused: our trainer's
    "max_grad_norm": "0.5",
    "caption_dropout_rate": "0.25",
    "caption_dropout_every_n_epochs": "0",
    "caption_tag_dropout_rate": "0.0",
    "face_crop_aug_range": "None",
    "prior_loss_weight": "0.5",
    "min_snr_gamma": "5.0",
    "scale_weight_norms": "1.0",
    "ip_noise_gamma": "0.1",
    "ip_noise_gamma_random_strength": "False",
    "debiased_estimation": "True",
    "loss_type": "huber",
    "huber_schedule": "snr",
    "huber_scale": "1.0",
    "huber_c": "0.2",
    "fp8_base": "False",
    "fp8_base_unet": "False",
    "validation_seed": "None",
    "validation_split": "0.0",
    "max_validation_steps": "None",
    "validate_every_n_epochs": "None",
    "validate_every_n_steps": "None",
    "resize_interpolation": "None",
}
LEFT_OUT = {  # on every way here; test_files_are_hashed_as_sd_scripts_does has them
    "sd_model_hash": "the base is a folder: only of one file",
    "vae_name": "no VAE of its own was given",
    "vae_hash": "no VAE of its own was given",
    "new_vae_hash": "no VAE of its own was given",
}
OF_FOLDERS = (  # one data set, with the options' settings
    *("batch_size_per_device", "total_batch_size", "resolution", "color_aug", "flip_aug"),
    *("random_crop", "shuffle_caption", "enable_bucket", "bucket_no_upscale", "min_bucket_reso"),
    *("max_bucket_reso", "keep_tokens", "reg_dataset_dirs", "bucket_info"),
)
BUCKETS = "--enable_bucket --min_bucket_reso 32 --max_bucket_reso 64 --bucket_reso_steps 32"
CAT, DOG = {"sks cat": 3, "grass": 1}, {"zwz dog": 2}


@dataclass(frozen=True)
class Way:
    """One way to give the two folders `2_sks cat` (3 images) and `1_zwz dog` (2)."""

    options: str  # {0}: where they lie; § for a space
    batches: int  # of an epoch
    dirs: dict[str, tuple[int, int]]  # name -> repeats, images
    tags: dict[str, dict[str, int]]
    regular: dict[str, tuple[int, int]]
    tables: bool = False

    @property
    def images(self) -> int:
        """With repeats."""
        return sum(repeats * count for repeats, count in self.dirs.values())

    @property
    def steps(self) -> int:
        """Of two epochs, two batches each."""
        return 2 * -(-self.batches // 2)


WAYS = {
    "folders": Way(
        f"--train_data_dir {{0}}/data --reg_data_dir {{0}}/reg --keep_tokens 1 {BUCKETS}",
        16,  # as many regularisation images as others
        {"1_zwz dog": (1, 2), "2_sks cat": (2, 3)},
        {"1_zwz dog": DOG, "2_sks cat": CAT, "1_cat": {"cat": 2}},
        {"1_cat": (1, 2)},
    ),
    "in_json": Way(
        "--in_json {0}/meta.json --train_data_dir {0}/data/2_sks§cat --dataset_repeats 4 "
        f"--keep_tokens 1 {BUCKETS}",
        12,
        {"meta.json": (4, 3)},
        {"meta.json": {"sks cat": 3, "sun": 3}},
        {},
    ),
    "dataset_config": Way(
        "--dataset_config {0}/sets.toml", 3, {"2_sks cat": (2, 3)}, {"2_sks cat": CAT}, {}, True
    ),
    "tasks": Way(
        f"--config {{0}}/run.toml --keep_tokens 1 {BUCKETS}",
        3,
        {"2_sks cat": (1, 3)},
        {"2_sks cat": CAT},
        {},
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The two folders, one image of them captioned; and the same as the other ways have it."""
    cat = draw_pictures(tmp_path / "data" / "2_sks cat", 3)
    draw_pictures(tmp_path / "data" / "1_zwz dog", 2, "teal")
    draw_pictures(tmp_path / "reg" / "1_cat", 2, "gray")
    (cat / "00.txt").write_text("sks cat, Grass")
    entries = {p.stem: {"caption": "", "tags": "sks cat, sun"} for p in cat.glob("*.png")}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    (tmp_path / "sets.toml").write_text(
        "[[datasets]]\nbatch_size = 2\nresolution = 32\nenable_bucket = true\n"
        "min_bucket_reso = 32\nmax_bucket_reso = 64\nbucket_reso_steps = 32\n"
        f'[[datasets.subsets]]\nimage_dir = "{cat}"\nnum_repeats = 2\nflip_aug = true\n'
        'class_tokens = "sks cat"\ncaption_prefix = "p"\n'
    )
    (tmp_path / "run.toml").write_text(
        f'[[tasks]]\nname = "cat"\nconcept = "sks cat"\nimage_dir = "{cat}"\n'
        'train_prompt = "sks cat"\n'
    )
    return tmp_path


def wanted_of(way: Way, file: Path, base: Path) -> dict[str, Any]:
    """What each key must say of that way; a pattern where no run can know it."""
    factors = next(iter(read_lora(file).adapter.values()))
    told = SAID | {
        "session_id": re.compile(r"\d+"),
        "training_started_at": re.compile(r"\d{10}(\.\d+)?"),
        "training_finished_at": re.compile(r"\d{10}(\.\d+)?"),
        "output_name": "run",
        "num_train_images": str(way.images),
        "num_reg_images": str(sum(r * n for r, n in way.regular.values())),
        "num_batches_per_epoch": str(way.batches),
        "steps": str(way.steps),
        "max_train_steps": str(way.steps),
        "network_dim": str(factors.rank),  # the file's, which the options need not be
        "network_alpha": str(factors.alpha),
        "sd_model_name": base.name,
        "new_sd_model_hash": re.compile("[0-9a-f]{64}"),  # of the folder's files, our own
        "tag_frequency": way.tags,
        "dataset_dirs": as_kohya(way.dirs),
    }
    if way.tables:
        return told | {"datasets": DATASETS}
    count = way.images + (way.images if way.regular else 0)
    return told | {
        "batch_size_per_device": "1",
        "total_batch_size": "2",  # with the accumulated ones
        "resolution": "(32, 32)",
        "color_aug": "False",
        "flip_aug": "False",
        "random_crop": "False",
        "shuffle_caption": "False",
        "enable_bucket": "True",
        "bucket_no_upscale": "False",
        "min_bucket_reso": "32",
        "max_bucket_reso": "64",
        "keep_tokens": "1",
        "reg_dataset_dirs": as_kohya(way.regular),
        "bucket_info": {
            "buckets": {"0": {"resolution": [32, 32], "count": count}},
            "mean_img_ar_error": 0.0,
        },
    }


def as_kohya(dirs: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"n_repeats": r, "img_count": n} for name, (r, n) in dirs.items()}


DATASETS = [  # as train_network.py words a data set of a configuration file
    {
        "is_dreambooth": True,
        "batch_size_per_device": 2,
        "num_train_images": 6,
        "num_reg_images": 0,
        "resolution": [32, 32],
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 64,
        "tag_frequency": {"2_sks cat": CAT},
        "bucket_info": {
            "buckets": {"0": {"resolution": [32, 32], "count": 6}},
            "mean_img_ar_error": 0.0,
        },
        "resize_interpolation": None,
        "subsets": [
            {
                "img_count": 3,
                "num_repeats": 2,
                "color_aug": False,
                "flip_aug": True,
                "random_crop": False,
                "shuffle_caption": False,
                "keep_tokens": 0,
                "keep_tokens_separator": "",
                "secondary_separator": None,
                "enable_wildcard": False,
                "caption_prefix": "p",
                "caption_suffix": None,
                "resize_interpolation": None,
                "image_dir": "2_sks cat",
                "class_tokens": "sks cat",
                "is_reg": False,
            }
        ],
    }
]


def left_out(way: Way) -> dict[str, str]:
    """The keys that a file of that way does without, and why."""
    if way.tables:
        return LEFT_OUT | dict.fromkeys(OF_FOLDERS, "ss_datasets says it of each data set")
    return LEFT_OUT | {"datasets": "one data set, said by the keys of folders"}


@pytest.mark.parametrize("name", WAYS)
def test_every_documented_key_says_what_sd_scripts_would(
    data: Path, toy_base: Path, name: str
) -> None:
    way = WAYS[name]
    more = [word.replace("§", " ") for word in way.options.format(data).split()]
    place = ["--pretrained_model_name_or_path", str(toy_base), "--output_dir", str(data / "out")]
    assert main([*place, "--output_name", "run", *GIVEN, *more]) == 0
    file = data / "out" / "run.safetensors"
    header = read_header(file).metadata
    wanted, without = wanted_of(way, file, toy_base), left_out(way)
    assert [f"ss_{key}" for key in without if f"ss_{key}" in header] == []
    wrong = {
        key: (header.get(key), wanted[key[3:]])
        for key in DOCUMENTED
        if key[3:] not in without and not says(header.get(key), wanted[key[3:]])
    }
    assert wrong == {}
    others = {key for key in header if key.startswith("ss_") and not key.startswith("ss_lcp_")}
    assert others <= set(DOCUMENTED)


def says(text: str | None, value: Any) -> bool:
    if text is None:
        return False
    if isinstance(value, re.Pattern):
        return value.fullmatch(text) is not None
    return text == value if isinstance(value, str) else bool(json.loads(text) == value)


def test_no_documented_key_is_left_open() -> None:
    assert len(DOCUMENTED) == len(set(DOCUMENTED)) == 88
    open_keys = {
        *SAID,
        *LEFT_OUT,
        *OF_FOLDERS,
        *("session_id", "training_started_at", "training_finished_at", "output_name"),
        *("num_train_images", "num_reg_images", "num_batches_per_epoch", "steps"),
        *("max_train_steps", "network_dim", "network_alpha", "sd_model_name"),
        *("new_sd_model_hash", "tag_frequency", "dataset_dirs", "datasets"),
    }
    assert {f"ss_{key}" for key in open_keys} == set(DOCUMENTED)


@pytest.mark.parametrize(
    ("facts", "keys"),
    [
        (
            lambda path: facts_of_base({"name": str(path)}),
            ("sd_model_name", "sd_model_hash", "new_sd_model_hash"),
        ),
        (lambda path: facts_of_vae(str(path)), ("vae_name", "vae_hash", "new_vae_hash")),
    ],
)
def test_files_are_hashed_as_sd_scripts_does(
    tmp_path: Path, facts: Callable[[Path], dict[str, Any]], keys: tuple[str, ...]
) -> None:
    data = bytes(range(256)) * 6000  # 1.5 MB: the short hash looks at 64 KiB at 1 MiB
    (tmp_path / "m.safetensors").write_bytes(data)
    short = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    wanted = ("m.safetensors", short, hashlib.sha256(data).hexdigest())
    assert facts(tmp_path / "m.safetensors") == dict(zip(keys, wanted, strict=True))
