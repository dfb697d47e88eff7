"""The promise to kohya's users, item by item: every option, rule and mended fault has its test.

Options and grades as sd-scripts' sdxl_train_network.py has them (kohya-ss/sd-scripts at 48d368fa):
M must, S should, R rare, A without effect on an SDXL LoRA, X broken there.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from test_option_effects import COURSE, DATA, LOSS

from lcp_plugin.config.options import option_fields

TESTS = Path(__file__).parents[1]
KOHYA = {
    "M": """
        pretrained_model_name_or_path vae no_half_vae max_token_length train_data_dir dataset_config
        reg_data_dir resolution train_batch_size caption_extension shuffle_caption keep_tokens
        caption_dropout_rate enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps
        bucket_no_upscale cache_latents cache_latents_to_disk cache_text_encoder_outputs
        cache_text_encoder_outputs_to_disk network_module network_dim network_alpha network_args
        network_train_unet_only network_weights dim_from_weights base_weights
        base_weights_multiplier optimizer_type optimizer_args learning_rate unet_lr text_encoder_lr
        lr_scheduler lr_warmup_steps lr_scheduler_num_cycles max_grad_norm max_train_steps
        max_train_epochs gradient_accumulation_steps seed mixed_precision gradient_checkpointing
        xformers sdpa max_data_loader_n_workers persistent_data_loader_workers noise_offset
        min_snr_gamma prior_loss_weight
        sample_prompts sample_every_n_epochs sample_every_n_steps sample_at_first sample_sampler
        output_dir output_name save_model_as save_precision save_every_n_epochs save_every_n_steps
        save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state
        save_state resume logging_dir log_with log_prefix config_file
    """,
    "S": """
        v_parameterization zero_terminal_snr cache_info alpha_mask keep_tokens_separator
        caption_prefix caption_suffix enable_wildcard caption_dropout_every_n_epochs
        caption_tag_dropout_rate weighted_captions flip_aug vae_batch_size network_dropout
        scale_weight_norms training_comment lr_scheduler_type lr_scheduler_args full_fp16 full_bf16
        fp8_base fp8_base_unet lowram highvram noise_offset_random_strength adaptive_noise_scale
        multires_noise_iterations multires_noise_discount
        ip_noise_gamma ip_noise_gamma_random_strength debiased_estimation_loss
        scale_v_pred_loss_like_noise_pred min_timestep max_timestep loss_type huber_schedule huber_c
        huber_scale save_n_epoch_ratio save_state_on_train_end initial_epoch initial_step
        skip_until_initial_step no_metadata metadata_title metadata_author metadata_description
        metadata_license metadata_tags metadata_usage_hint metadata_thumbnail metadata_merged_from
        metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding
        log_tracker_name wandb_run_name wandb_api_key console_log_level console_log_file
        console_log_simple validation_split validation_seed validate_every_n_steps
        validate_every_n_epochs max_validation_steps output_config
    """,
    "R": """
        tokenizer_cache_dir disable_mmap_load_safetensors in_json dataset_repeats dataset_class
        debug_dataset conditioning_data_dir masked_loss secondary_separator caption_separator
        token_warmup_min token_warmup_step color_aug random_crop face_crop_aug_range
        resize_interpolation skip_image_resolution skip_cache_check lr_scheduler_power
        network_train_text_encoder_only
        lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio mem_eff_attn torch_compile
        dynamo_backend deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path
        offload_param_device offload_param_nvme_path zero3_init_flag zero3_save_16bit_model
        fp16_master_weights_and_gradients ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph
        v_pred_like_loss huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
        huggingface_token huggingface_repo_visibility save_state_to_huggingface
        resume_from_huggingface async_upload log_tracker_config log_config
    """,
    "A": "v2 clip_skip caption_extention use_8bit_adam use_lion_optimizer blocks_to_swap",
    "X": "fused_backward_pass cpu_offload_checkpointing text_encoder_lr1 text_encoder_lr2",
}
GRADES = {name: grade for grade, names in KOHYA.items() for name in names.split()}

R, K, C = "run_options", "kohya_options", "config_load"
# option -> the test (file::name, without test_) in which it stands and changes what it should;
# of a test's parameters the word is given behind a space
TESTED = {
    "pretrained_model_name_or_path":
        "traits::a_base_with_ztsnr_turns_both_options_on_with_a_notice",
    "vae": f"{R}::another_vae_encodes_the_images_and_is_named",
    "no_half_vae": f"{K}::the_vae_runs_in_fp32_whatever_the_precision",
    "max_token_length": f"{K}::captions_may_be_long_and_weighted",
    "weighted_captions": f"{K}::captions_may_be_long_and_weighted",
    "network_module": f"{K}::network_module_means_kohyas_targets_and_start",
    "network_dim": f"{R}::an_update_is_scaled_by_network_alpha_over_network_dim",
    "network_alpha": f"{R}::an_update_is_scaled_by_network_alpha_over_network_dim",
    "network_dropout": f"{K}::dropout_changes_what_is_learned_and_repeats",
    "network_weights": f"{K}::network_weights_go_on_with_their_own_rank_and_alpha",
    "dim_from_weights": f"{K}::dim_from_weights_trains_the_modules_of_the_file_only",
    "base_weights": f"{K}::base_weights_belong_to_the_base_with_their_multiplier",
    "base_weights_multiplier": f"{K}::base_weights_belong_to_the_base_with_their_multiplier",
    "scale_weight_norms": f"{K}::no_update_is_larger_than_scale_weight_norms",
    "optimizer_type": "optimizer_packages::a_step_is_really_trained_and_recorded",
    "optimizer_args": f"{K}::max_grad_norm_clips",
    "use_8bit_adam": f"{C}::old_optimizer_flags_work",
    "use_lion_optimizer": f"{C}::old_optimizer_flags_work",
    "lr_scheduler_type": f"{K}::anyones_scheduler_sets_the_rates_and_a_resumed_run_agrees",
    "max_grad_norm": f"{K}::max_grad_norm_clips",
    "mixed_precision": f"{K}::the_vae_runs_in_fp32_whatever_the_precision",
    "full_fp16": f"{R}::full_fp16_and_full_bf16_are_the_factors_types",
    "full_bf16": f"{K}::full_bf16_keeps_factors_in_bf16",
    "fp8_base": f"{K}::fp8_text_encoders_stay_small_when_they_move",
    "fp8_base_unet": f"{K}::fp8_base_stores_a_byte_a_weight_and_predicts_alike",
    "base_dtype": "stored::a_stored_base_predicts_as_its_rounded_weights_in_fp32",
    "gradient_checkpointing": "run::gradient_checkpointing_changes_nothing_but_memory",
    "xformers": "run::xformers_missing_is_one_warning_and_sdpa",
    "sdpa": "machine_options::attention_is_the_one_asked_for",
    "max_data_loader_n_workers":
        f"{R}::as_many_workers_read_images_as_max_data_loader_n_workers_says",
    "torch_compile": f"{K}::torch_compile_goes_through_the_backend_that_is_named",
    "dynamo_backend": f"{K}::torch_compile_goes_through_the_backend_that_is_named",
    "ddp_timeout": "machine_options::ddp_options_reach_accelerate",
    "ddp_gradient_as_bucket_view": "machine_options::ddp_options_reach_accelerate",
    "ddp_static_graph": "machine_options::ddp_options_reach_accelerate",
    "sample_sampler": f"{K}::sample_sampler_draws_what_a_prompt_leaves_open",
    "output_dir": f"{R}::a_run_lies_where_output_dir_and_output_name_say",
    "output_name": f"{R}::a_run_lies_where_output_dir_and_output_name_say",
    "save_model_as": f"{K}::pickles_are_asked_for_and_safetensors_are_written",
    "save_precision": f"{K}::save_precision_is_the_deliverables",
    "save_state_on_train_end": f"{K}::a_state_at_the_end_lets_a_run_be_longer",
    "resume": f"{K}::a_run_goes_on_from_a_saved_state",
    "no_metadata": f"{K}::no_metadata_leaves_what_readers_need",
    "training_comment": f"{K}::the_header_says_what_kohyas_does_and_more",
    "metadata_title": f"{K}::the_header_says_what_kohyas_does_and_more",
    "metadata_author": f"{K}::the_header_says_what_kohyas_does_and_more",
    **{
        f"metadata_{name}": f"{K}::every_metadata_option_is_in_the_header {name}"
        for name in (
            *("description", "license", "tags", "usage_hint", "thumbnail", "merged_from"),
            *("trigger_phrase", "preprocessor", "is_negative_embedding"),
        )
    },
    "logging_dir": "logs::tensorboards_folder_has_prefix_and_time",
    "log_with": "tracking::names_settings_and_key_reach_the_tracker",
    "log_prefix": f"{K}::a_tracker_gets_options_losses_and_the_validation_loss",
    "log_tracker_name": "tracking::names_settings_and_key_reach_the_tracker",
    "wandb_run_name": "tracking::names_settings_and_key_reach_the_tracker",
    "wandb_api_key": "tracking::names_settings_and_key_reach_the_tracker",
    "log_tracker_config": "tracking::names_settings_and_key_reach_the_tracker",
    "log_config": "tracking::names_settings_and_key_reach_the_tracker",
    "console_log_level": f"{K}::console_log_level_hides_notices",
    "console_log_file": f"{K}::console_log_file_takes_the_messages",
    "max_validation_steps": f"{K}::max_validation_steps_measures_fewer_images",
    "config": f"{C}::config_and_config_file_mean_the_same",
    "config_file": f"{C}::config_and_config_file_mean_the_same",
    "strict_config": f"{C}::strict_config_refuses_keys_of_other_tools",
    "output_config": f"{C}::output_config_writes_what_was_given_and_reads_back",
    "strategy": "run::a_chain_with_another_strategy_must_be_asked_for",
    "strategy_args": f"{K}::a_given_start_wins_and_a_chain_may_differ_in_it",
    "observer": "tracking::every_observer_is_told_the_validation_loss",
    "prev": f"{K}::no_metadata_leaves_what_readers_need",
    "prev_prompts": "parent_prompts::prompts_that_are_given_are_what_is_rehearsed",
    "skip_image_resolution": "config_foreign::small_images_and_empty_subsets_are_left_out "
    "skip_image_resolution",
    "allow_strategy_change": "run::a_chain_with_another_strategy_must_be_asked_for",
    "order_seed": "run::order_seed_shuffles_as_the_paper_does",
    "overwrite": "run::a_finished_run_refuses_to_start_over_and_says_the_way_out",
    "carry_as": "machine_options::a_carry_that_float8_does_not_take_is_said",
    "preset": "traits::a_presets_plan_on_the_embedded_base_labels_its_estimates",
    "resume_every_n_steps": "run::sigterm_saves_first_and_the_same_command_goes_on",
    "keep_carries": "run::earlier_carries_are_rebuilt_bit_for_bit",
    "max_file_size": f"{K}::a_large_deliverable_is_pointed_out",
    "export": "config_broken::a_broken_config_gets_one_clear_line an unknown form of export",
    "dry_run": "traits::the_plan_of_a_dry_run_is_at_the_bases_own_size",
    "list_strategies": f"{C}::listing_strategies_needs_nothing_else",
    "cache_dir": f"{R}::caches_lie_in_cache_dir",
    "lora_targets": "targets::the_number_of_layers_is_kohyas",
    "lora_init": f"{K}::a_given_start_wins_and_a_chain_may_differ_in_it",
    "samples_per_task": f"{R}::settings_of_samples_at_boundaries_reach_the_sampler",
    "sample_steps": f"{R}::settings_of_samples_at_boundaries_reach_the_sampler",
    "guidance_scale": f"{R}::settings_of_samples_at_boundaries_reach_the_sampler",
    "sample_seed": f"{R}::settings_of_samples_at_boundaries_reach_the_sampler",
    "evaluate": f"{R}::settings_of_the_scores_reach_the_evaluation",
    "evaluate_images": f"{R}::settings_of_the_scores_reach_the_evaluation",
    "evaluate_prompts": f"{R}::settings_of_the_scores_reach_the_evaluation",
}  # fmt: skip

# what goes wrong in the trainer that we take over from -> the tests that it does not here
FAULTS = {
    "a file's alpha is saved but not trained with":
        f"{K}::network_weights_go_on_with_their_own_rank_and_alpha",
    "keys of other tools load nothing": "formats::unknown_keys_are_listed_and_counted",
    "files with diffusers' names load nothing": "kohya::sgm_and_diffusers_names_train_the_same",
    "text-encoder parts vanish with network_train_unet_only":
        f"{K}::what_network_weights_change_and_the_run_does_not_train_is_kept",
    "base_weights change which modules are trained":
        f"{K}::base_weights_are_hashed_into_the_base_and_never_delivered",
    "text caches come from another text encoder":
        "kohya::another_base_and_stale_text_caches_are_refused",
    "caches outlive an edited caption or image":
        f"{R}::edited_captions_and_images_are_encoded_anew_and_others_are_not",
    "latent caches outlive a new resolution":
        "dataset::another_resolution_does_not_meet_the_old_latents",
    "latent caches outlive another VAE":
        "dataset::the_disk_cache_is_used_again_and_keyed_by_the_vae",
    "a resumed run counts steps and rates anew": f"{K}::a_run_goes_on_from_a_saved_state",
    "a scheduler behind its end trains with rate 0":
        f"{K}::a_state_at_the_end_lets_a_run_be_longer",
    "a changed rate is ignored by a resumed run":
        "run::a_changed_config_refuses_to_resume_and_names_the_keys",
    "headers know no parents": f"{K}::network_weights_go_on_with_their_own_rank_and_alpha",
    "text_encoder_lr1 and 2 do not exist": "option_effects::an_option_changes_what_it_should",
    "fused_backward_pass and others are parsed and unused":
        "option_effects::an_option_without_effect_is_told_with_its_reason",
    "NaN is cached": "dataset::an_encoder_that_gives_nan_is_refused_and_nothing_is_cached",
    "NaN in a cache is trusted": "caches::nan_on_disk_is_as_good_as_none",
    "merging two LoRAs has cross terms and squared weights":
        "merging::kohyas_scalar_example_sums_to_what_was_wanted",
    "a list of two text-encoder rates uses the first":
        f"{K}::parts_have_rates_of_their_own_and_none_means_untrained",
    "images directly in train_data_dir are no data":
        f"{C}::images_directly_in_train_data_dir_are_found_with_a_notice",
    "wrong folders are no data": "config_broken::a_broken_config_gets_one_clear_line "
        "a train_data_dir without images",
    "typos are ignored": "config_broken::a_broken_config_gets_one_clear_line a typo at the top",
    "NaN losses go on": "run::nan_stops_the_run_and_keeps_the_last_good_state",
    "NaN is saved": "formats::nan_is_neither_read_nor_written",
    "a half-precision VAE overflows": f"{K}::the_vae_runs_in_fp32_whatever_the_precision",
    "out of memory without advice": f"{K}::running_out_of_memory_names_the_flags_that_help",
    "caches of texts that change are an assertion":
        "dataset::changing_captions_set_the_text_cache_aside_with_a_notice",
    "caches of images that change are an assertion":
        "dataset::random_crops_set_the_latent_cache_aside_with_a_notice",
    "bitsandbytes fails":
        "optim::a_broken_bitsandbytes_gives_one_warning_and_the_same_algorithm",
    "xformers fails": "run::xformers_missing_is_one_warning_and_sdpa",
    "attention is naive by default": "machine_options::attention_is_the_one_asked_for",
    "checkpoints are hashed at every start": "files::a_file_hash_is_remembered_by_size_and_time",
    "unfit defaults": f"{C}::kohyas_defaults_that_are_unfit_for_sdxl_are_pointed_out_once",
    "v-prediction is not recognised": "traits::a_single_file_says_by_keys_how_it_was_trained",
    "zero terminal SNR is not recognised":
        "traits::a_base_with_ztsnr_turns_both_options_on_with_a_notice",
    "zero terminal SNR is forgotten in samples":
        f"{K}::v_prediction_and_zero_terminal_snr_hold_for_samples_too",
    "huber_scale is left out of one schedule": "loss::the_huber_family_follows_its_schedule",
    "errors are tracebacks":
        "config_broken::the_command_line_prints_the_problems_without_a_traceback_or_a_model",
    "a byte-order mark breaks a config": f"{C}::a_windows_bom_is_skipped",
    "backslashes of Windows in TOML": "config_broken::broken_toml_names_file_and_remedy",
    "the size in the header is always 1024":
        "tracking::the_header_names_the_size_that_was_trained_at",
    "samples without prompts are a TypeError":
        "config_broken::a_broken_config_gets_one_clear_line samples without prompts",
    "keys twice in a prompts file are a TypeError":
        "config_prompts::a_toml_file_has_shared_values_and_subsets_that_win",
    "network_module must be given":
        f"{C}::without_a_network_module_only_the_attention_of_the_unet_is_trained",
    "constant with warm-up stops":
        f"{C}::constant_with_warm_up_becomes_constant_with_warmup",
    "optimizer_args with = in them fail": "optim::arguments_are_python_literals",
    "a whole number as resolution crashes": f"{C}::one_number_is_a_square",
    "save_precision and alpha of a file": "formats::alpha_is_exact_in_a_half_precision_file",
}  # fmt: skip

# a rule of config and dataset files -> its test
RULES = {
    "tables are dissolved, later duplicates win":
        f"{C}::tables_are_dissolved_and_later_duplicates_win",
    "flags beat the file, which beats defaults":
        f"{C}::a_flag_beats_the_file_which_beats_the_preset_which_beats_the_default",
    "dataset files beat the command line": f"{C}::dataset_files_beat_the_command_line",
    ".toml may be left out; --config is --config_file":
        f"{C}::config_and_config_file_mean_the_same",
    "abbreviated flags": f"{C}::kohyas_abbreviated_flags_work",
    "numbers and truth values as text": f"{C}::numbers_and_booleans_may_be_text",
    "a true option can be switched off": f"{C}::a_true_option_can_be_switched_off_by_a_flag",
    "lists of key=value": f"{C}::key_values_come_as_list_text_or_table",
    "keys of other tools are told": f"{C}::keys_of_other_tools_are_told_not_refused",
    "all problems at once":
        "config_broken::all_problems_are_listed_at_once_each_with_its_source",
    "choices hold": "config_broken::a_broken_config_gets_one_clear_line a choice that is none",
    "a missing file is one line": "config_broken::a_missing_config_lists_ours_and_the_nearest",
    "networks.lora": f"{C}::networks_lora_means_kohyas_targets_and_start",
    "output_config": f"{C}::output_config_writes_what_was_given_and_reads_back",
    "a GUI's config": "config_wild::configs_from_the_wild_train",
    "JSON as dataset file": f"{C}::a_dataset_file_may_be_json",
    "metadata subsets": f"{C}::metadata_subsets_need_no_image_folder",
    "<repeats>_<class> folders": f"{C}::kohyas_repeat_folders_work_inside_a_task",
    "other folders are ignored": f"{C}::folders_without_repeats_are_ignored_with_a_notice",
    "no repeats from names in dataset files":
        f"{R}::a_folders_name_gives_no_repeats_in_a_dataset_file",
    "a folder twice": f"{R}::a_folder_counts_once_in_a_data_set_but_again_in_another",
    "what is refused there": f"{R}::what_kohya_refuses_in_a_dataset_file_is_one_line",
    "0 counts as set": f"{R}::a_whole_number_is_a_validation_split_too",
    "regularisation images are balanced":
        f"{R}::regularisation_images_are_repeated_to_as_many_as_are_trained",
    "regularisation images are weighed":
        "dataset::regularisation_images_carry_the_prior_loss_weight",
}  # fmt: skip


@cache
def read_tests(file: str) -> dict[str, str]:
    """Test -> its source with decorators, of tests/test_<file>.py; and the whole file as ""."""
    (path,) = TESTS.glob(f"*/test_{file}.py")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {"": text}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


def source_of(place: str) -> str:
    """The source of the test that `file::name` names. AssertionError if there is none."""
    file, name = place.split(" ")[0].split("::")
    found = read_tests(file)
    assert f"test_{name}" in found, f"tests/test_{file}.py has no test_{name}"
    return found[f"test_{name}"]


def test_every_option_of_kohyas_is_here_under_its_grade() -> None:
    ours = {name: field.metadata["grade"] for name, field in option_fields().items()}
    assert {name: grade for name, grade in ours.items() if grade != "ours"} == GRADES


def test_every_option_is_seen_to_change_something_or_named_as_without_effect() -> None:
    without = {n for n, field in option_fields().items() if field.metadata["no_effect"]}
    seen = {*DATA, *LOSS, *COURSE, *TESTED}
    assert set(option_fields()) - seen - without == set(), "write a test of these"
    assert without & seen == set(), "these are said to have no effect"
    assert set(TESTED) & {*DATA, *LOSS, *COURSE} == set()
    assert seen <= set(option_fields())


def test_options_that_must_or_should_work_are_not_without_effect_but_for_a_few() -> None:
    without = {n for n, field in option_fields().items() if field.metadata["no_effect"]}
    assert without & set(KOHYA["M"].split()) == {"persistent_data_loader_workers"}  # always so
    assert without & set(KOHYA["S"].split()) == {
        *("cache_info", "lowram", "highvram", "console_log_simple"),  # always so
        *("initial_epoch", "initial_step", "skip_until_initial_step"),  # a state knows its place
    }


@pytest.mark.parametrize("name", TESTED)
def test_the_test_of_an_option_is_there_and_names_it(name: str) -> None:
    place, _, word = TESTED[name].partition(" ")
    source = source_of(place)
    if word:  # one of the parameters, which may stand in a table of the file
        assert word in read_tests(place.split("::")[0])[""]
    else:
        assert re.search(rf"\b{name}\b", source)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_mended_fault_has_its_test(fault: str) -> None:
    place, _, word = FAULTS[fault].partition(" ")
    assert source_of(place)
    assert word in read_tests(place.split("::")[0])[""]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_config_files_has_its_test(rule: str) -> None:
    place, _, word = RULES[rule].partition(" ")
    assert source_of(place)
    assert word in read_tests(place.split("::")[0])[""]
