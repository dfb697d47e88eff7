"""The promise to kohya's users: every option is known under its grade, and few have no effect.

Options and grades as sd-scripts' sdxl_train_network.py has them (kohya-ss/sd-scripts at 48d368fa):
M must, S should, R rare, A without effect on an SDXL LoRA, X broken there.
"""

from __future__ import annotations

from lcp_plugin.config.options import option_fields

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


def test_every_option_of_kohyas_is_here_under_its_grade() -> None:
    ours = {name: field.metadata["grade"] for name, field in option_fields().items()}
    assert {name: grade for name, grade in ours.items() if grade != "ours"} == GRADES


def test_options_that_must_or_should_work_are_not_without_effect_but_for_a_few() -> None:
    without = {n for n, field in option_fields().items() if field.metadata["no_effect"]}
    assert without & set(KOHYA["M"].split()) == {"persistent_data_loader_workers"}  # always so
    assert without & set(KOHYA["S"].split()) == {
        *("cache_info", "lowram", "highvram", "console_log_simple"),  # always so
        *("initial_epoch", "initial_step", "skip_until_initial_step"),  # a state knows its place
    }
