"""Options about the base, the network, optimisation, precision, noise and loss."""

from __future__ import annotations

from dataclasses import dataclass

from lcp_plugin.config.fields import group
from lcp_plugin.seeds import LARGEST_SEED

_model = group("Base model")
_network = group("Network")
_optimizer = group("Optimizer and learning rate", per_task=True)
_memory = group("Precision and memory")
_noise = group("Noise and loss", per_task=True)

_FULL_FINETUNE = "only full fine-tuning scripts use it, in kohya's tools too"


@dataclass(frozen=True)
class ModelOptions:
    """Which base is personalised, and which factors are trained on it."""

    pretrained_model_name_or_path: str | None = _model(
        None,
        "diffusers folder, hub id, single .safetensors file, or tiny-sdxl (comes with this)",
    )
    vae: str | None = _model(None, "another VAE: file, folder or hub id")
    no_half_vae: bool = _model(
        False,
        "run the VAE in fp32",
        fixed=False,
        differs="always so, given or not: SDXL's VAE overflows in fp16",
    )
    v_parameterization: bool = _model(
        False,
        "the base predicts v, not epsilon",
        grade="S",
        differs="recognised from the checkpoint where it says so",
    )
    v2: bool = _model(False, "Stable Diffusion 2", grade="A", no_effect="the base is SDXL")
    clip_skip: int | None = _model(
        None,
        "text-encoder layers to skip",
        grade="A",
        no_effect="SDXL always uses the penultimate layer",
    )
    tokenizer_cache_dir: str | None = _model(
        None,
        "folder of tokenizers",
        grade="R",
        no_effect="the tokenizers come with the base",
    )
    disable_mmap_load_safetensors: bool = _model(
        False,
        "read a single-file base at once",
        grade="R",
        no_effect="the file is read once from front to back, mapped or not",
    )

    network_module: str | None = _network(
        None,
        "networks.lora means kohya's targets, initialisation and trained text encoders",
        choices=("networks.lora", "lcp_plugin.kohya"),
        differs="may be left out: then lora_targets decides and only the UNet is trained",
    )
    network_dim: int | None = _network(
        None, "rank of the factors; unset: 4", minimum=1, per_task=True
    )
    network_alpha: float = _network(
        1.0,
        "alpha; the update is scaled by alpha / rank (0: alpha = rank)",
        minimum=0,
        per_task=True,
    )
    network_dropout: float | None = _network(
        None,
        "dropout between A and B",
        grade="S",
        minimum=0,
        maximum=1,
        per_task=True,
    )
    network_args: tuple[str, ...] = _network(
        (),
        "conv_dim, conv_alpha, rank_dropout, module_dropout, block_dims, block_alphas, "
        "conv_block_dims, conv_block_alphas, down_lr_weight, mid_lr_weight, up_lr_weight, "
        "block_lr_zero_threshold, loraplus_lr_ratio, loraplus_unet_lr_ratio, "
        "loraplus_text_encoder_lr_ratio as key=value",
        key_values=True,
    )
    network_train_unet_only: bool = _network(
        False,
        "leave the text encoders alone",
        differs="implied where network_module and text_encoder_lr are both unset",
    )
    network_train_text_encoder_only: bool = _network(
        False, "train the text encoders only", grade="R"
    )
    network_weights: str | None = _network(
        None,
        "start from the factors of this file",
        differs="the file's alpha and rank hold in training and in what is saved",
    )
    dim_from_weights: bool = _network(
        False,
        "take ranks and alphas from network_weights",
        differs="always so: a file's factors keep their rank",
    )
    base_weights: tuple[str, ...] = _network(
        (), "LoRA files that belong to the base: fused, hashed, not delivered"
    )
    base_weights_multiplier: tuple[float, ...] = _network(
        (), "weight of each of base_weights; missing ones are 1"
    )
    scale_weight_norms: float | None = _network(
        None,
        "largest norm of a module's update; larger ones are scaled down",
        grade="S",
        minimum=0,
        zero_unset=True,
        per_task=True,
    )
    lora_targets: str = _network(
        "attention",
        "attention: to_q, to_k, to_v, to_out.0 (560 matrices in SDXL); transformer: kohya's 722",
        grade="ours",
        choices=("attention", "transformer"),
    )
    lora_init: str | None = _network(
        None,
        "start of A; unset: the strategy's own (gaussian)",
        grade="ours",
        choices=("gaussian", "unit", "kaiming"),
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """Steps, optimizer and learning rates of a task."""

    optimizer_type: str = _optimizer(
        "",
        "AdamW, AdamW8bit, PagedAdamW8bit, Lion8bit, Adafactor, Prodigy, ... or package.mod.Class",
    )
    optimizer_args: tuple[str, ...] = _optimizer((), "key=value", key_values=True)
    use_8bit_adam: bool = _optimizer(False, "old form of optimizer_type=AdamW8bit", grade="A")
    use_lion_optimizer: bool = _optimizer(False, "old form of optimizer_type=Lion", grade="A")
    learning_rate: float = _optimizer(2e-6, "of all parts that have none of their own", minimum=0)
    unet_lr: float | None = _optimizer(None, "of the UNet", minimum=0)
    text_encoder_lr: tuple[float, ...] = _optimizer(
        (),
        "of the text encoders: one, or one for each",
        differs="with two values the second is text_encoder_2's (kohya uses the first for both)",
    )
    text_encoder_lr1: float | None = _optimizer(
        None,
        "of text_encoder (CLIP-L)",
        grade="X",
        differs="named in kohya's docs, missing there",
        minimum=0,
    )
    text_encoder_lr2: float | None = _optimizer(
        None,
        "of text_encoder_2 (OpenCLIP bigG)",
        grade="X",
        differs="named in kohya's docs, missing there",
        minimum=0,
    )
    lr_scheduler: str = _optimizer(
        "constant",
        "course of the learning rate within a task",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "adafactor",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            "piecewise_constant",
        ),
    )
    lr_warmup_steps: float = _optimizer(
        0,
        'steps; below 1, or "10%", a share of all',
        minimum=0,
        differs="constant with warm-up means constant_with_warmup (kohya stops)",
    )
    lr_decay_steps: float = _optimizer(
        0, "steps of decay of warmup_stable_decay; below 1 a share", grade="R", minimum=0
    )
    lr_scheduler_num_cycles: int = _optimizer(
        1, "restarts of cosine_with_restarts", minimum=1, zero_unset=True
    )
    lr_scheduler_power: float = _optimizer(1.0, "power of polynomial", grade="R")
    lr_scheduler_timescale: int | None = _optimizer(
        None,
        "steps; of inverse_sqrt; unset: the warm-up's",
        grade="R",
        minimum=1,
        zero_unset=True,
    )
    lr_scheduler_min_lr_ratio: float | None = _optimizer(
        None,
        "end of cosine_with_min_lr and warmup_stable_decay, as a share",
        grade="R",
        minimum=0,
        maximum=1,
    )
    lr_scheduler_type: str = _optimizer("", "package.mod.Class of a scheduler", grade="S")
    lr_scheduler_args: tuple[str, ...] = _optimizer((), "key=value", grade="S", key_values=True)
    max_grad_norm: float = _optimizer(1.0, "gradients are clipped to it; 0 = never", minimum=0)
    max_train_steps: int = _optimizer(1600, "optimizer steps of a task", minimum=1, zero_unset=True)
    max_train_epochs: int | None = _optimizer(
        None, "epochs of a task; beats max_train_steps", minimum=1, zero_unset=True
    )
    gradient_accumulation_steps: int = _optimizer(
        1, "micro-batches in a step", minimum=1, zero_unset=True
    )
    seed: int | None = _optimizer(
        None,
        "of all random numbers",
        per_task=False,
        minimum=0,
        maximum=LARGEST_SEED,
        differs="unset means 42, not a random one: the same command gives the same file",
    )
    fused_backward_pass: bool = _optimizer(
        False, "step within the backward pass", grade="X", no_effect=_FULL_FINETUNE
    )


@dataclass(frozen=True)
class MemoryOptions:
    """Precision, memory and speed."""

    mixed_precision: str = _memory("no", "arithmetic", choices=("no", "fp16", "bf16"))
    full_fp16: bool = _memory(False, "factors and gradients in fp16 too", grade="S")
    full_bf16: bool = _memory(False, "factors and gradients in bf16 too", grade="S")
    fp8_base: bool = _memory(False, "frozen weights stored in float8 e4m3", grade="S")
    fp8_base_unet: bool = _memory(False, "the UNet's frozen weights in float8 e4m3", grade="S")
    base_dtype: str = _memory(
        "auto",
        "what the frozen weights are stored in; auto: mixed_precision's type. bf16 with "
        "mixed_precision = no halves the base on a CPU that cannot multiply bf16 itself",
        grade="ours",
        choices=("auto", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = _memory(
        False, "recompute activations: less memory, slower", fixed=False
    )
    xformers: bool = _memory(False, "attention by xformers; SDPA where it is unusable", fixed=False)
    sdpa: bool = _memory(
        True,
        "attention by PyTorch; off: by plain matrix products, slower and larger",
        fixed=False,
        differs="on unless another is asked for",
    )
    mem_eff_attn: bool = _memory(
        False, "old memory-saving attention", grade="R", no_effect="SDPA saves as much and is exact"
    )
    max_data_loader_n_workers: int = _memory(
        8,
        "processes that read images",
        minimum=0,
        fixed=False,
        differs="never more than cores; none are started where all is cached",
    )
    persistent_data_loader_workers: bool = _memory(
        False,
        "keep these processes between epochs",
        no_effect="one loader serves all epochs of a task, so they always stay",
    )
    lowram: bool = _memory(
        False,
        "load the base straight onto the GPU",
        grade="S",
        no_effect="weights are read from the mapped file one by one, never twice in main memory",
    )
    highvram: bool = _memory(
        False,
        "do not empty the GPU's cache between parts",
        grade="S",
        no_effect="the GPU's cache is never emptied between steps",
    )
    torch_compile: bool = _memory(False, "compile the UNet", grade="R", fixed=False)
    dynamo_backend: str = _memory("inductor", "backend of torch_compile", grade="R", fixed=False)
    cpu_offload_checkpointing: bool = _memory(
        False,
        "checkpointed activations to main memory",
        grade="X",
        no_effect="SDXL's UNet has no such mode (kohya stops with a TypeError)",
    )
    blocks_to_swap: int | None = _memory(
        None,
        "blocks kept in main memory",
        grade="A",
        no_effect="not for SDXL, in kohya's tools too",
    )
    ddp_timeout: int | None = _memory(
        None,
        "minutes that processes wait for each other",
        grade="R",
        fixed=False,
        minimum=1,
        zero_unset=True,
    )
    ddp_gradient_as_bucket_view: bool = _memory(
        False, "processes share gradients without a copy", grade="R", fixed=False
    )
    ddp_static_graph: bool = _memory(
        False, "every step uses the same factors: processes wait less", grade="R", fixed=False
    )


@dataclass(frozen=True)
class NoiseOptions:
    """Noise, timesteps and loss of training."""

    noise_offset: float | None = _noise(None, "shift of a channel's mean noise (0.0357 is common)")
    noise_offset_random_strength: bool = _noise(
        False, "draw the offset between 0 and noise_offset", grade="S"
    )
    adaptive_noise_scale: float | None = _noise(
        None, "adds |mean latent| times this to noise_offset", grade="S"
    )
    multires_noise_iterations: int | None = _noise(
        None, "layers of pyramid noise (6 to 10)", grade="S", minimum=0
    )
    multires_noise_discount: float = _noise(
        0.3, "weight of a layer relative to the finer one", grade="S", minimum=0
    )
    ip_noise_gamma: float | None = _noise(
        None, "input perturbation: extra noise that is not the target (0.1)", grade="S", minimum=0
    )
    ip_noise_gamma_random_strength: bool = _noise(
        False, "draw it between 0 and ip_noise_gamma", grade="S"
    )
    min_snr_gamma: float | None = _noise(
        None, "weight min(snr, gamma) / snr (5; arXiv 2303.09556)", minimum=0, zero_unset=True
    )
    debiased_estimation_loss: bool = _noise(
        False, "weight 1 / sqrt(snr) (arXiv 2310.08442)", grade="S"
    )
    scale_v_pred_loss_like_noise_pred: bool = _noise(
        False, "weight of v-prediction as epsilon has it: snr / (snr + 1)", grade="S"
    )
    v_pred_like_loss: float | None = _noise(
        None,
        "adds this times loss * (snr + 1) / snr, as v-prediction would; not with v-prediction",
        grade="R",
    )
    zero_terminal_snr: bool = _noise(
        False,
        "rescale betas so that the last step is pure noise (arXiv 2305.08891)",
        grade="S",
        per_task=False,
        differs="holds for loss weights and sampling too (kohya forgets both); unset: as the "
        "checkpoint says (key ztsnr, or its scheduler's settings)",
    )
    min_timestep: int | None = _noise(
        None, "lowest timestep (0 to 999)", grade="S", minimum=0, maximum=999
    )
    max_timestep: int | None = _noise(
        None,
        "timesteps stay below it (1 to 1000)",
        grade="S",
        minimum=1,
        maximum=1000,
        zero_unset=True,
    )
    loss_type: str = _noise(
        "l2", "loss per pixel", grade="S", choices=("l2", "l1", "huber", "smooth_l1")
    )
    huber_schedule: str = _noise(
        "snr",
        "how huber_c falls with the timestep",
        grade="S",
        choices=("snr", "exponential", "constant"),
    )
    huber_c: float = _noise(0.1, "where huber turns from l2 to l1", grade="S", minimum=1e-6)
    huber_scale: float = _noise(
        1.0,
        "factor of huber_c",
        grade="S",
        minimum=0,
        differs="holds for huber_schedule=snr too (kohya leaves it out)",
    )
    prior_loss_weight: float = _noise(1.0, "weight of regularisation images", minimum=0)
