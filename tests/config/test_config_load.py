"""From flags, preset, config and dataset files to one checked run: kohya's rules, and ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from config_texts import HEAD, TASK, fill_folder

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.config.write import render_given_options, write_given_options
from lcp_plugin.errors import ConfigError

Load = Callable[..., RunConfig]


# Precedence and flattening


def test_a_flag_beats_the_file_which_beats_the_preset_which_beats_the_default(load: Load) -> None:
    text = HEAD + 'preset = "8gb"\ntrain_batch_size = 3\nseed = 1\n' + TASK
    run = load(text, "--seed", "2")
    assert run.options.seed == 2
    assert run.options.train_batch_size == 3
    assert run.options.gradient_checkpointing is True
    assert run.options.max_grad_norm == 1.0
    assert run.provenance["seed"] == "command line"
    assert run.provenance["train_batch_size"] == "run.toml"
    assert run.provenance["gradient_checkpointing"] == "preset 8gb"
    assert "max_grad_norm" not in run.provenance


def test_arguments_of_one_strategy_are_not_those_of_another_that_a_flag_names(load: Load) -> None:
    text = HEAD + 'strategy = "recall"\nstrategy_args = ["every=2"]\n' + TASK
    assert load(text, "--strategy", "recall").options.strategy_args == ("every=2",)
    other = load(text, "--strategy", "naive")
    assert other.options.strategy_args == ()
    assert "strategy_args" not in other.provenance
    assert [n for n in other.notices if "they are recall's, not naive's" in n]
    own = load(text, "--strategy", "merge_ortho_init", "--strategy_args", "mode=row_null")
    assert own.options.strategy_args == ("mode=row_null",)


def test_tables_are_dissolved_and_later_duplicates_win(load: Load) -> None:
    text = HEAD + "learning_rate = 1e-3\n[whatever]\nlearning_rate = 1e-4\nseed = 5\n" + TASK
    run = load(text)
    assert (run.options.learning_rate, run.options.seed) == (1e-4, 5)


def test_dataset_files_beat_the_command_line(load: Load, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        "[general]\nflip_aug = true\ncaption_extension = '.txt'\n"
        "[[datasets]]\nbatch_size = 4\nresolution = 64\nkeep_tokens = 1\n"
        "[[datasets.subsets]]\nimage_dir = 'dogs'\nnum_repeats = 7\nclass_tokens = 'x'\n"
        "[[datasets.subsets]]\nimage_dir = 'train/10_sks dog'\nkeep_tokens = 2\nflip_aug = false\n"
    )
    flags = ["--dataset_config", "data.toml", "--train_batch_size", "2", "--resolution", "512"]
    run = load(HEAD, *flags, "--keep_tokens", "9", "--shuffle_caption")
    (dataset,) = run.tasks[0].datasets
    first, second = dataset.subsets
    assert (dataset.batch_size, dataset.resolution) == (4, (64, 64))
    assert (first.num_repeats, first.keep_tokens, first.flip_aug) == (7, 1, True)
    assert (second.num_repeats, second.keep_tokens, second.flip_aug) == (1, 2, False)
    assert first.shuffle_caption  # the command line holds where the file says nothing
    assert first.caption_extension == ".txt"


def test_a_tasks_own_options_beat_the_file_but_not_a_flag(load: Load) -> None:
    text = HEAD + "learning_rate = 1e-3\nmax_train_steps = 9\n" + TASK
    text += "learning_rate = 1e-4\nmax_train_steps = 5\n"
    run = load(text, "--max_train_steps", "2")
    assert run.tasks[0].overrides == {"learning_rate": 1e-4}
    assert run.tasks[0].options.learning_rate == 1e-4
    assert run.tasks[0].options.max_train_steps == 2
    assert any("--max_train_steps" in notice for notice in run.notices)


def test_a_true_option_can_be_switched_off_by_a_flag(load: Load) -> None:
    run = load(HEAD + "flip_aug = true\n" + TASK, "--flip_aug", "false")
    assert run.options.flip_aug is False


def test_config_and_config_file_mean_the_same(load: Load, tmp_path: Path) -> None:
    load(HEAD + TASK)
    for flags in (["--config_file", "run"], ["--config", "run.toml"], ["--config=run"]):
        assert load_config(flags).tasks[0].name == "dog"


def test_kohyas_abbreviated_flags_work(load: Load) -> None:
    run = load(HEAD + TASK, "--network_di", "8", "--max-train-steps", "3")
    assert (run.options.network_dim, run.options.max_train_steps) == (8, 3)


# Types


def test_numbers_and_booleans_may_be_text(load: Load) -> None:
    text = 'learning_rate = "1e-4"\nnetwork_dim = "32"\nflip_aug = "true"\nnetwork_alpha = 16\n'
    options = load(
        HEAD + text + 'lr_warmup_steps = "10%"\nmax_train_steps = 100.0\n' + TASK
    ).options
    assert (options.learning_rate, options.network_dim, options.flip_aug) == (1e-4, 32, True)
    assert isinstance(options.network_alpha, float)
    assert options.lr_warmup_steps == pytest.approx(0.1)
    assert options.max_train_steps == 100


@pytest.mark.parametrize("value", ['"1024,768"', "[1024, 768]"])
def test_a_resolution_is_width_and_height(load: Load, value: str) -> None:
    assert load(HEAD + f"resolution = {value}\n" + TASK).options.resolution == (1024, 768)


@pytest.mark.parametrize("value", ['"512"', "512", "[512]"])
def test_one_number_is_a_square(load: Load, value: str) -> None:
    assert load(HEAD + f"resolution = {value}\n" + TASK).options.resolution == (512, 512)


def test_an_empty_text_means_not_given(load: Load) -> None:
    run = load(HEAD + 'vae = ""\nlogging_dir = ""\noptimizer_type = ""\n' + TASK)
    assert run.options.vae is None
    assert run.options.optimizer_type == "AdamW"


def test_zero_of_an_every_option_means_never(load: Load) -> None:
    run = load(HEAD + "save_every_n_epochs = 0\nsample_every_n_steps = 0\n" + TASK)
    assert run.options.save_every_n_epochs is None
    assert run.options.sample_every_n_steps is None


def test_one_rate_or_two_for_text_encoders(load: Load) -> None:
    assert load(HEAD + "text_encoder_lr = 1e-5\n" + TASK).options.text_encoder_lr == (1e-5,)
    two = load(HEAD + "text_encoder_lr = [1e-5, 2e-5]\n" + TASK)
    assert two.options.text_encoder_lr == (1e-5, 2e-5)
    named = load(HEAD + "learning_rate = 1e-4\ntext_encoder_lr2 = 3e-5\n" + TASK)
    assert named.options.text_encoder_lr == (1e-4, 3e-5)


def test_key_values_come_as_list_text_or_table(load: Load) -> None:
    expected = ("weight_decay=0.01", "betas=0.9,0.99")
    for text in (
        'optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99"]',
        'optimizer_args = "weight_decay=0.01 betas=0.9,0.99"',
        "[optimizer_args]\nweight_decay = 0.01\nbetas = [0.9, 0.99]",
    ):
        assert load(f"{HEAD}{text}\n{TASK}").options.optimizer_args == expected
    flags = ["--optimizer_args", "weight_decay=0.01", "betas=0.9,0.99"]
    assert load(HEAD + TASK, *flags).options.optimizer_args == expected


def test_a_windows_bom_is_skipped(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + (HEAD + TASK).encode()).tasks[0].name == "dog"


# What follows from what


def test_without_a_network_module_only_the_attention_of_the_unet_is_trained(load: Load) -> None:
    options = load(HEAD + TASK).options
    assert options.lora_targets == "attention"
    assert not options.trains_text_encoders


def test_networks_lora_means_kohyas_targets_and_start(load: Load) -> None:
    options = load(HEAD + 'network_module = "networks.lora"\n' + TASK).options
    assert (options.lora_targets, options.lora_init) == ("transformer", "kaiming")
    assert options.trains_text_encoders


def test_what_is_said_beats_what_networks_lora_implies(load: Load) -> None:
    text = 'network_module = "networks.lora"\nlora_targets = "attention"\n'
    assert load(HEAD + text + TASK).options.lora_targets == "attention"


def test_caches_on_disk_imply_caches(load: Load) -> None:
    text = "cache_latents_to_disk = true\ncache_text_encoder_outputs_to_disk = true\n"
    options = load(HEAD + text + TASK).options
    assert options.cache_latents
    assert options.cache_text_encoder_outputs


@pytest.mark.parametrize(
    ("text", "name"),
    [("use_8bit_adam = true", "AdamW8bit"), ("use_lion_optimizer = true", "Lion"), ("", "AdamW")],
)
def test_old_optimizer_flags_work(load: Load, text: str, name: str) -> None:
    assert load(f"{HEAD}{text}\n{TASK}").options.optimizer_type == name


def test_constant_with_warm_up_becomes_constant_with_warmup(load: Load) -> None:
    assert (
        load(HEAD + "lr_warmup_steps = 5\n" + TASK).options.lr_scheduler == "constant_with_warmup"
    )


def test_an_unset_seed_is_always_the_same(load: Load) -> None:
    assert load(HEAD + TASK).options.seed == 42


def test_rank_and_alpha_have_kohyas_fallbacks(load: Load) -> None:
    options = load(HEAD + "network_alpha = 0\n" + TASK).options
    assert (options.rank, options.alpha) == (4, 4.0)


# What is told


def test_options_without_effect_are_told_with_the_reason(load: Load) -> None:
    run = load(HEAD + "clip_skip = 2\ndeepspeed = true\nzero_stage = 3\n" + TASK)
    assert any("clip_skip has no effect here: SDXL" in n for n in run.notices)
    assert any(n.startswith("deepspeed, zero_stage have no effect") for n in run.notices)


def test_keys_of_other_tools_are_told_not_refused(load: Load) -> None:
    run = load(HEAD + 'epoch = 12\nLoRA_type = "Standard"\n' + TASK)
    assert any("epoch = 12 is read as max_train_epochs" in n for n in run.notices)
    assert (run.options.max_train_epochs, run.options.network_module) == (12, "networks.lora")


def test_a_key_with_words_more_or_less_is_told_not_refused(load: Load) -> None:
    text = "network_train_text_encoder = true\nlearning_rate_scale = 2\n"
    run = load(HEAD + text + TASK)
    told = [n for n in run.notices if "not known here" in n]
    assert len(told) == 2
    assert "Did you mean network_train_text_encoder_only?" in told[0]


def test_a_misspelt_key_that_is_off_is_told_not_refused(load: Load) -> None:
    run = load(HEAD + "shufle_caption = false\n" + TASK)
    assert any("Did you mean shuffle_caption?" in n for n in run.notices)


def test_a_section_may_be_named_like_an_option(load: Load) -> None:
    text = "[optimizer_args]\noptimizer_type = 'Lion'\n[sample_prompts]\nsample_sampler = 'euler'\n"
    options = load(HEAD + text + TASK).options
    assert (options.optimizer_type, options.sample_sampler) == ("Lion", "euler")
    assert (options.optimizer_args, options.sample_prompts) == ((), None)


def test_strict_config_refuses_keys_of_other_tools(load: Load) -> None:
    with pytest.raises(ConfigError, match="unknown key 'epoch'. Did you mean max_train_epochs?"):
        load(HEAD + "epoch = 12\n" + TASK, "--strict_config")


def test_kohyas_defaults_that_are_unfit_for_sdxl_are_pointed_out_once(load: Load) -> None:
    told = [n for n in load(HEAD + TASK).notices if "seldom right for SDXL" in n]
    assert len(told) == 1
    for key in ("learning_rate = 2e-6", "network_dim = 4", "network_alpha = 1"):
        assert key in told[0]
    text = "learning_rate = 1e-4\nnetwork_dim = 16\nnetwork_alpha = 16\n"
    assert not [n for n in load(HEAD + text + TASK).notices if "seldom right" in n]


def test_observers_may_be_given_again_and_again(load: Load) -> None:
    flags = ["--observer", "a", "--observer", "pkg.mod:B", "c"]
    assert load(HEAD + TASK, *flags).options.observer == ("a", "pkg.mod:B", "c")


# Writing, and starting fast


def test_output_config_writes_what_was_given_and_reads_back(tmp_path: Path) -> None:
    target = tmp_path / "given"
    flags = ["--output_config", "--config_file", str(target), "--resolution", "512,768"]
    flags += ["--network_dim", "8", "--optimizer_args", "weight_decay=0.1", "--flip_aug"]
    run = load_config([*flags, "--pretrained_model_name_or_path", "tiny-sdxl"])
    path = write_given_options(run)
    assert path == tmp_path / "given.toml"
    fill_folder(tmp_path / "dogs")
    again = load_config(["--config", str(path), "--train_data_dir", str(tmp_path / "dogs")]).options
    assert (again.network_dim, again.resolution, again.flip_aug) == (8, (512, 768), True)
    assert again.optimizer_args == ("weight_decay=0.1",)
    with pytest.raises(ConfigError, match="exists"):
        write_given_options(run)
    assert "output_config" not in render_given_options(run)


def test_listing_strategies_needs_nothing_else() -> None:
    assert load_config(["--list_strategies"]).options.list_strategies


def test_reading_a_config_imports_no_heavy_package() -> None:
    code = (
        "import sys; from lcp_plugin.config.load import load_config; "
        "load_config(['--list_strategies']); "
        "print([m for m in ('torch', 'numpy', 'PIL', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--network_alpha" in text
    assert "--allow_strategy_change" in text
