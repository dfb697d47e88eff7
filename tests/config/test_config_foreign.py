"""Files of kohya's front ends, and TOML as people write it, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcp_plugin.cli import main
from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.errors import Page

FORM: dict[str, Any] = {
    "LoRA_type": "Standard", "optimizer": "AdamW8bit", "optimizer_args": "", "epoch": 30,
    "max_train_epochs": "", "max_train_steps": 0, "max_resolution": "64,64", "network_dim": 8,
    "network_alpha": 4, "learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": 0,
    "train_data_dir": "img", "caption_extension": ".txt", "conv_dim": 1, "rank_dropout": 0.1,
    "block_dims": "", "unit": 1, "use_cp": False, "noise_offset_type": "Original",
    "noise_offset": 0, "adaptive_noise_scale": 0.01, "multires_noise_iterations": 8, "seed": 0,
    "vae_batch_size": 0, "lr_warmup": 10, "xformers": "xformers", "sdxl": True, "vae": "",
    "additional_parameters": "--min_snr_gamma 5", "output_name": "x", "min_snr_gamma": 0,
    "pretrained_model_name_or_path": "tiny-sdxl",
}  # fmt: skip
EASY = """
[[subsets]]
image_dir = "img/2_sks toy"
num_repeats = 3
name = "one"
[train_mode]
train_mode = "lora"
[general_args.args]
pretrained_model_name_or_path = "tiny-sdxl"
max_train_epochs = 2
[general_args.dataset_args]
resolution = 64
batch_size = 2
[network_args.args]
network_dim = 4
[network_args.args.network_args]
conv_dim = 2
algo = "locon"
[optimizer_args.args]
optimizer_type = "AdamW"
[optimizer_args.args.optimizer_args]
weight_decay = 0.1
"""


@pytest.fixture(autouse=True)
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("img/2_sks toy", "empty"):
        Path(folder).mkdir(parents=True)
    Image.new("RGB", (96, 64), "teal").save("img/2_sks toy/a.png")


def load_form(**changes: Any) -> RunConfig:
    Path("gui.json").write_text(json.dumps({**FORM, **changes}))
    return load_config(["--config", "gui.json"])


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """complain(file, text, *flags): what a dry run of this config ends with; it must fail."""

    def run(name: str, text: str, *flags: str) -> str:
        Path(name).write_text(text)
        assert main(["--config", name, "--dry_run", *flags]) != 0
        return capsys.readouterr().err

    return run


def test_a_forms_names_and_units_are_translated() -> None:
    options = load_form().options
    assert (options.optimizer_type, options.max_train_epochs) == ("AdamW8bit", 30)
    assert (options.resolution, options.network_module) == ((64, 64), "networks.lora")
    assert options.network_args == ("rank_dropout=0.1",)  # conv_dim is LoCon's
    assert options.xformers
    assert options.lr_warmup_steps == pytest.approx(0.1)
    assert options.min_snr_gamma == 5.0


def test_a_forms_number_may_be_any_and_its_cycles_are_its_epochs() -> None:
    """kohya_gui/lora_gui.py: lr_scheduler_num_cycles is int(epoch) where it is empty."""
    run = load_form(bucket_reso_steps=1.0, huber_c=0, lr_scheduler_num_cycles="")
    assert run.options.bucket_reso_steps == 8
    assert run.options.lr_scheduler_num_cycles == 30
    assert load_form(lr_scheduler_num_cycles=2).options.lr_scheduler_num_cycles == 2


def test_a_forms_standard_lora_keeps_what_its_front_end_passes_on() -> None:
    """Of the fields on convolutions a Standard form drops conv_dim and conv_alpha alone."""
    ranks = ",".join(["4"] * 23)
    args = load_form(conv_block_dims=ranks, conv_alpha=2, rank_dropout=0).options.network_args
    assert args == (f"conv_block_dims={ranks}",)


def test_a_form_without_prompts_draws_no_samples() -> None:
    run = load_form(sample_prompts="", sample_every_n_epochs=1, sample_every_n_steps=0)
    assert run.options.sample_every_n_epochs is None
    assert any("sample_every_n_epochs is not used" in notice for notice in run.notices)


def test_a_form_that_names_a_file_of_prompts_means_the_file(complain: Callable[..., str]) -> None:
    text = json.dumps({**FORM, "sample_prompts": "E:/prompts.txt", "sample_every_n_epochs": 1})
    assert "sample_prompts E:/prompts.txt cannot be read" in complain("gui.json", text)


def test_what_stands_beside_a_table_of_arguments_counts() -> None:
    text = '[optimizer]\noptimizer_type = "Lion"\n[optimizer.args]\nlearning_rate = 1e-5\n'
    Path("o.toml").write_text(
        f'pretrained_model_name_or_path = "tiny-sdxl"\ntrain_data_dir = "img"\n{text}'
    )
    options = load_config(["--config", "o.toml"]).options
    assert (options.optimizer_type, options.learning_rate) == ("Lion", 1e-5)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("w.json", '{"train_data_dir": "C:\\Users\\img"}', "with two backslashes"),
        ("w.json", '{"train_data_dir": "C:\\train\\new"}', "with two backslashes"),
        ("w.json", "model: x\nsteps: 3\n", "is YAML"),
        ("w.json", "[1, 2]", "wanted a table of keys"),
        ("w.toml", 'train_data_dir = "E:\\img"\n', "'single quotes'"),
    ],
)
def test_what_a_file_is_decides_how_it_is_mended(
    complain: Callable[..., str], name: str, text: str, words: str
) -> None:
    assert words in complain(name, text)


def test_toml_under_a_json_name_is_read() -> None:
    Path("t.json").write_text('# mine\ntrain_data_dir = "img"\nmax_train_steps = 5\n')
    options = load_config(["--config", "t.json", "--pretrained_model", "tiny-sdxl"]).options
    assert options.max_train_steps == 5


def test_a_forms_zeros_were_left_alone() -> None:
    options = load_form().options
    assert (options.seed, options.vae_batch_size, options.noise_offset) == (42, 1, None)
    assert options.multires_noise_iterations is None  # the form has chosen noise offset
    assert options.network_train_unet_only


def test_a_forms_locon_adapts_convolutions() -> None:
    assert "conv_dim=1" in load_form(LoRA_type="Kohya LoCon").options.network_args


def test_lycoris_locon_is_trained_on_the_layers_and_ranks_that_lycoris_gives_it() -> None:
    """lycoris/kohya.py: conv_dim and conv_alpha are network_dim and network_alpha where not given;
    preset full is networks.lora with conv_dim, attn-mlp without.
    """
    run = load_form(LoRA_type="LyCORIS/LoCon", conv_dim=0, LyCORIS_preset="full")
    assert sorted(run.options.network_args) == ["conv_alpha=4", "conv_dim=8", "rank_dropout=0.1"]
    assert any("rank_dropout as networks.lora has it" in notice for notice in run.notices)
    run = load_form(LoRA_type="LyCORIS/LoCon", rank_dropout=0, LyCORIS_preset="attn-mlp")
    assert run.options.network_args == ()
    assert any("without conv_dim, on the same layers" in notice for notice in run.notices)
    changes = {"text_encoder_lr": 1e-4, "LyCORIS_preset": "unet-only"}
    assert load_form(LoRA_type="LyCORIS/LoCon", **changes).options.network_train_unet_only


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dora_wd": True}, "dora_wd"),
        ({"train_norm": True}, "train_norm"),
        ({"LyCORIS_preset": "full-lin"}, "'full-lin'"),
    ],
)
def test_what_lycoris_would_make_of_a_locon_otherwise_stops(
    complain: Callable[..., str], change: dict[str, Any], words: str
) -> None:
    text = json.dumps({**FORM, "LoRA_type": "LyCORIS/LoCon", **change})
    assert words in complain("gui.json", text)


def test_steps_of_a_form_beat_its_epochs() -> None:
    run = load_form(max_train_steps=7)
    assert (run.options.max_train_steps, run.options.max_train_epochs) == (7, None)
    assert any("epoch = 30 is not used" in n for n in run.notices)


def test_another_network_stops_until_a_lora_is_asked_for(complain: Callable[..., str]) -> None:
    text = json.dumps({**FORM, "LoRA_type": "LyCORIS/LoHa"})
    assert "LyCORIS/LoHa" in complain("gui.json", text)
    config = load_config(["--config", "gui.json", "--network_module", "networks.lora"])
    assert config.options.network_dim == 8


def test_easy_training_scripts_tables_are_read() -> None:
    Path("e.toml").write_text(EASY)
    run = load_config(["--config", "e.toml"])
    (dataset,) = run.tasks[0].datasets
    assert (dataset.batch_size, dataset.resolution) == (2, (64, 64))
    assert dataset.subsets[0].num_repeats == 3
    assert run.options.network_args == ("conv_dim=2", "conv_alpha=1")
    assert run.options.optimizer_args == ("weight_decay=0.1",)


def test_lycoris_by_easy_training_scripts_has_a_conv_dim_of_its_own() -> None:
    text = EASY.replace("network_dim = 4", 'network_dim = 4\nnetwork_module = "lycoris.kohya"')
    Path("e.toml").write_text(text.replace("conv_dim = 2\n", ""))
    args = load_config(["--config", "e.toml"]).options.network_args
    assert sorted(args) == ["conv_alpha=1", "conv_dim=4"]


def test_a_loha_of_easy_training_scripts_stops(complain: Callable[..., str]) -> None:
    assert "algo = 'loha'" in complain("e.toml", EASY.replace("locon", "loha"))


def test_a_windows_path_in_double_quotes_is_pointed_out(complain: Callable[..., str]) -> None:
    line = complain("w.toml", 'train_data_dir = "D:\\train\\new"\n'.replace("\\\\", "\\"))
    assert "single quotes" in line


def test_yaml_is_named(complain: Callable[..., str]) -> None:
    assert "is YAML" in complain("a.yaml", "---\nname: x\nsteps:\n  - 1\n")


@pytest.mark.parametrize(
    ("name", "text", "tool", "page"),
    [
        (
            "#sdxl 1.0 LoRA.json",
            json.dumps({"__version": 10, "training_method": "LORA", "base_model_name": "x"}),
            "OneTrainer",
            Page.ONETRAINER,
        ),
        ("old.json", '{"concept_file_name": "concepts.json"}', "OneTrainer", Page.ONETRAINER),
        (
            "concepts.json",
            json.dumps([{"__version": 2, "image": {}, "text": {}, "name": "dog", "path": "dog"}]),
            "OneTrainer",
            Page.ONETRAINER,
        ),
        (
            "train.yaml",
            "---\njob: extension\nconfig:\n  name: x\n  process:\n    - type: 'sd_trainer'\n",
            "ai-toolkit",
            Page.AI_TOOLKIT,
        ),
        (
            "train.json",
            json.dumps({"job": "extension", "config": {"process": [{"type": "sd_trainer"}]}}),
            "ai-toolkit",
            Page.AI_TOOLKIT,
        ),
        (
            "config.json",
            json.dumps({"--model_type": "lora", "--model_family": "sdxl", "--lora_rank": 16}),
            "SimpleTuner",
            Page.SIMPLETUNER,
        ),
        (
            "multidatabackend.json",
            json.dumps([{"id": "dog", "type": "local", "instance_data_dir": "dog"}]),
            "SimpleTuner",
            Page.SIMPLETUNER,
        ),
    ],
)
def test_other_trainers_configurations_are_named_with_the_page_that_translates_them(
    capsys: pytest.CaptureFixture[str], name: str, text: str, tool: str, page: Page
) -> None:
    Path(name).write_text(text, encoding="utf-8")
    assert main(["--config", name]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert f"{name}: is a configuration of {tool}, which is not read here" in told
    assert told.endswith(f" See {page}")


def test_mixed_arrays_are_read() -> None:
    Path("m.toml").write_text(
        'pretrained_model_name_or_path = "tiny-sdxl"\ntrain_data_dir = "img"\n'
        "text_encoder_lr = [5e-5, 0]\n"
    )
    assert load_config(["--config", "m.toml"]).options.text_encoder_lr == (5e-5, 0.0)


def test_epochs_replace_steps_of_zero_and_nothing_else_does(complain: Callable[..., str]) -> None:
    head = 'pretrained_model_name_or_path = "tiny-sdxl"\ntrain_data_dir = "img"\n'
    assert "max_train_steps = 0" in complain("z.toml", head + 'max_train_steps = "0"\n')
    Path("z.toml").write_text(head + 'max_train_steps = "0"\nmax_train_epochs = 2\n')
    assert load_config(["--config", "z.toml"]).options.max_train_epochs == 2


def test_small_images_and_empty_subsets_are_left_out(
    complain: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[[datasets]]\nresolution = 64\nskip_image_resolution = {}\n"
    text += '[[datasets.subsets]]\nimage_dir = "img/2_sks toy"\n'
    text += '[[datasets.subsets]]\nimage_dir = "empty"\n'
    base = 'pretrained_model_name_or_path = "tiny-sdxl"\n'
    Path("d.toml").write_text(base + text.format(64))
    assert main(["--config", "d.toml", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "images: 1" in out
    assert "'empty' holds no images; it is left out" in out
    told = complain("d.toml", base + text.format(96))
    assert "has no images of more pixels than skip_image_resolution" in told


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ('image_dir = ""', "datasets[0].subsets[0]: image_dir is missing"),
        ("num_repeats = 2", "datasets[0].subsets[0]: image_dir is missing"),
        ('image_dir = "img/2_sks toy"\nis_reg = true', "no images but for regularisation"),
    ],
)
def test_a_subset_that_names_nothing_to_train_on_says_so(
    complain: Callable[..., str], subset: str, words: str
) -> None:
    text = 'pretrained_model_name_or_path = "tiny-sdxl"\n[[datasets]]\nresolution = 64\n'
    assert words in complain("d.toml", f"{text}[[datasets.subsets]]\n{subset}\n")


def test_paths_left_empty_in_a_subset_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    text = 'pretrained_model_name_or_path = "tiny-sdxl"\n[[datasets]]\nresolution = 64\n'
    text += '[[datasets.subsets]]\nimage_dir = "img/2_sks toy"\nmetadata_file = ""\n'
    Path("d.toml").write_text(f'{text}conditioning_data_dir = ""\n')
    assert main(["--config", "d.toml", "--dry_run"]) == 0
    assert "images: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--observer nothing.here:Watcher", "cannot import nothing.here"),
        ("--observer consol", "did you mean 'console'"),
        ("--learning_rate 0", "nothing to train"),
        (f"--network_args block_dims={','.join(['0'] * 23)}", "nothing to train"),
        ("--network_args conv_alpha=nan", "conv_alpha = 'nan'"),
        ("--network_args down_lr_weight=sine+x", "down_lr_weight = 'x'"),
        ("--lr_scheduler cosine --lr_scheduler_args T_max=9", "takes no lr_scheduler_args"),
        ("--lr_scheduler_type StepLR --lr_scheduler_args step_size=0", "fails at step 1"),
        (
            "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=1 total_steps=3",
            "fails at step 4",
        ),
    ],
)
def test_a_dry_run_refuses_what_training_would(
    capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    data = "--pretrained_model tiny-sdxl --train_data_dir img --max_train_steps 9 --network_dim 2"
    assert main([*data.split(), *flags.split(), "--dry_run"]) != 0
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("line", "part"),
    [("a --s 0", "1 to 1000"), ("a --s 2000", "1 to 1000"), ("a --w 7 --h 48", "32 to 8192"),
     ("a --ss dpmpp_2m", "wanted one of ddim")],
)  # fmt: skip
def test_values_in_a_prompt_file_are_checked_first(
    complain: Callable[..., str], line: str, part: str
) -> None:
    Path("p.txt").write_text(line)
    text = 'pretrained_model_name_or_path = "tiny-sdxl"\ntrain_data_dir = "img"\n'
    assert part in complain("p.toml", text, "--sample_prompts", "p.txt")
