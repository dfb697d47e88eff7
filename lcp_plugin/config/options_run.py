"""Options of the run: tasks and strategy, samples, files, logs; and some without effect."""

from __future__ import annotations

from dataclasses import dataclass

from lcp_plugin.config.fields import group
from lcp_plugin.config.samplers import SAMPLERS
from lcp_plugin.seeds import LARGEST_SEED

_run = group("Tasks and strategy", grade="ours")
_sample = group("Samples", fixed=False)
_save = group("Saving and resuming", fixed=False)
_meta = group("Metadata", fixed=False, grade="S")
_log = group("Logging", fixed=False)
_validate = group("Validation", fixed=False, grade="S")
_config = group("Configuration", fixed=False)
_hub = group("Hugging Face", fixed=False, grade="R")
_deepspeed = group(
    "DeepSpeed",
    grade="R",
    no_effect="a LoRA's optimizer state is small; the frozen base gains nothing from ZeRO",
)

_KNOWS_WHERE = "a resumed run knows where it stopped, and data follow from the step's number"
_ONE_UPLOAD = "nothing is uploaded while training; upload the finished file yourself"


@dataclass(frozen=True)
class RunOptions:
    """What crosses a task boundary, and how a run relates to earlier ones."""

    strategy: str = _run(
        "recall", "recall, naive, merge_init, merge_ortho_init, magmax, ... or package.mod:Class"
    )
    strategy_args: tuple[str, ...] = _run(
        (), "key=value of the strategy (--list_strategies)", key_values=True
    )
    observer: tuple[str, ...] = _run((), "names or package.mod:Class; repeatable", fixed=False)
    prev: str | None = _run(None, "chain on this task folder, deliverable or any SDXL LoRA")
    prev_prompts: tuple[str, ...] = _run(
        (), "prompts of what a LoRA of another tool knows, for strategies that rehearse it"
    )
    allow_strategy_change: bool = _run(
        False, "chain on a folder that another strategy wrote", fixed=False
    )
    order_seed: int | None = _run(None, "shuffle the tasks as the paper does; unset: file order")
    overwrite: bool = _run(
        False,
        "start over where a finished run, or one with other settings or images, is",
        fixed=False,
    )
    carry_as: str = _run(
        "auto",
        "where the carried delta sits: fused into the weights (auto), or a branch beside them",
        choices=("auto", "branch", "fuse"),
    )
    preset: str | None = _run(
        None,
        "settings for a GPU, or the paper's",
        choices=("8gb", "12gb", "24gb", "paper"),
        fixed=False,
    )
    resume_every_n_steps: int = _run(
        100, "optimizer steps between states to resume from; 0 = none", minimum=0, fixed=False
    )
    keep_carries: str = _run("last", "carries kept on disk", choices=("last", "all"), fixed=False)
    max_file_size: str | None = _run(
        None, "of the deliverable (e.g. 2GB); above it the summary offers truncation", fixed=False
    )
    export: tuple[str, ...] = _run(
        (),
        "more forms of the deliverable: lora:RANK, diff, diffusers, peft, checkpoint",
        fixed=False,
    )
    dry_run: bool = _run(False, "print the plan and stop", fixed=False)
    list_strategies: bool = _run(False, "print strategies with their options", fixed=False)


@dataclass(frozen=True)
class SampleOptions:
    """Images during training (kohya's) and at each boundary (ours)."""

    sample_prompts: str | None = _sample(
        None, "prompts: .txt, .toml or .json file; in a config also themselves, one a line"
    )
    sample_every_n_steps: int | None = _sample(
        None, "steps between samples", minimum=1, zero_unset=True
    )
    sample_every_n_epochs: int | None = _sample(
        None, "epochs between samples; beats steps", minimum=1, zero_unset=True
    )
    sample_at_first: bool = _sample(False, "sample before the first step too")
    sample_sampler: str = _sample(
        "ddim",
        "sampler of all samples",
        choices=SAMPLERS,
    )
    samples_per_task: int = _sample(
        1, "images of every task so far at each boundary; 0 = none", grade="ours", minimum=0
    )
    sample_steps: int = _sample(30, "denoising steps of these", grade="ours", minimum=1)
    guidance_scale: float = _sample(5.0, "guidance of these", grade="ours", minimum=0)
    evaluate: tuple[str, ...] = _sample(
        (), "metrics scored when the run ends: effnet, clip_i, dino, ...", grade="ours"
    )
    evaluate_images: int = _sample(
        8, "images per prompt and cell when the run is scored", grade="ours", minimum=1
    )
    evaluate_prompts: int | None = _sample(
        None, "prompts per task when the run is scored; unset: all", grade="ours", minimum=1
    )
    sample_seed: int = _sample(
        42, "of these images' starting noise", grade="ours", minimum=0, maximum=LARGEST_SEED
    )


@dataclass(frozen=True)
class SaveOptions:
    """What is written, where and when."""

    output_dir: str | None = _save(None, 'folder of results; unset: "output"')
    output_name: str | None = _save(None, 'name of the run and its file; unset: "last"')
    save_model_as: str = _save(
        "safetensors",
        "file format",
        choices=("safetensors", "ckpt", "pt"),
        differs="ckpt and pt are pickles: written as safetensors, with a notice",
    )
    save_precision: str | None = _save(
        None,
        "of the deliverable; unset: fp32",
        choices=("float", "fp32", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = _save(None, "of a task", minimum=1, zero_unset=True)
    save_every_n_steps: int | None = _save(None, "of a task", minimum=1, zero_unset=True)
    save_n_epoch_ratio: int | None = _save(
        None, "save about so many times in a task", grade="S", minimum=1, zero_unset=True
    )
    save_last_n_epochs: int | None = _save(
        None, "keep those of the last n epochs", minimum=1, zero_unset=True
    )
    save_last_n_epochs_state: int | None = _save(
        None, "the same for states", minimum=1, zero_unset=True
    )
    save_last_n_steps: int | None = _save(
        None, "keep those of the last n steps", minimum=1, zero_unset=True
    )
    save_last_n_steps_state: int | None = _save(
        None, "the same for states", minimum=1, zero_unset=True
    )
    save_state: bool = _save(
        False, "keep a state with every such file", differs="safetensors and JSON, no pickle"
    )
    save_state_on_train_end: bool = _save(False, "keep a state at the end of a task", grade="S")
    resume: str | None = _save(
        None,
        "go on from this state folder",
        differs="the same command resumes by itself; states that kohya pickled are refused",
    )
    initial_epoch: int | None = _save(
        None, "count epochs from here", grade="S", no_effect=_KNOWS_WHERE
    )
    initial_step: int | None = _save(
        None, "count steps from here", grade="S", no_effect=_KNOWS_WHERE
    )
    skip_until_initial_step: bool = _save(
        False, "skip data up to initial_step", grade="S", no_effect=_KNOWS_WHERE
    )
    no_metadata: bool = _save(False, "keep only the header's indispensable keys", grade="S")


@dataclass(frozen=True)
class MetadataOptions:
    """What the deliverable's header says."""

    training_comment: str | None = _meta(None, "ss_training_comment")
    metadata_title: str | None = _meta(None, "title; unset: output_name")
    metadata_author: str | None = _meta(None, "author")
    metadata_description: str | None = _meta(None, "description")
    metadata_license: str | None = _meta(None, "licence")
    metadata_tags: str | None = _meta(None, "tags, separated by commas")
    metadata_usage_hint: str | None = _meta(None, "usage hint")
    metadata_thumbnail: str | None = _meta(None, "thumbnail as a data URL")
    metadata_merged_from: str | None = _meta(None, "titles of what was merged")
    metadata_trigger_phrase: str | None = _meta(
        None, "trigger phrase", differs="unset: the concepts of all tasks"
    )
    metadata_preprocessor: str | None = _meta(None, "preprocessor")
    metadata_is_negative_embedding: str | None = _meta(None, "whether it is a negative embedding")


@dataclass(frozen=True)
class LogOptions:
    """Where progress is told."""

    logging_dir: str | None = _log(None, "folder of tracker logs")
    log_with: str | None = _log(None, "tracker", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = _log(None, "before the date in the log folder's name")
    log_tracker_name: str | None = _log(None, "name of the tracker's project", grade="S")
    wandb_run_name: str | None = _log(None, "name of the run", grade="S")
    wandb_api_key: str | None = _log(None, "key to log in with", grade="S")
    log_tracker_config: str | None = _log(None, "TOML file of the tracker's settings", grade="R")
    log_config: bool = _log(False, "log all options", grade="R")
    console_log_level: str | None = _log(
        None,
        "how much is told",
        grade="S",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = _log(None, "file that messages go to", grade="S")
    console_log_simple: bool = _log(
        False, "plain messages", grade="S", no_effect="messages are always plain"
    )


@dataclass(frozen=True)
class ValidationOptions:
    """Loss on images that are not trained on."""

    validation_split: float = _validate(
        0.0, "share of the images kept for it", minimum=0, maximum=1, fixed=True
    )
    validation_seed: int | None = _validate(
        None, "which images; unset: seed", fixed=True, minimum=0, maximum=LARGEST_SEED
    )
    validate_every_n_steps: int | None = _validate(
        None, "steps between", minimum=1, zero_unset=True
    )
    validate_every_n_epochs: int | None = _validate(
        None, "epochs between", minimum=1, zero_unset=True
    )
    max_validation_steps: int | None = _validate(
        None, "batches at most", minimum=1, zero_unset=True
    )


@dataclass(frozen=True)
class ConfigOptions:
    """Where options come from."""

    config: str | None = _config(None, "TOML file, or a name in configs/", grade="ours")
    config_file: str | None = _config(None, "the same, kohya's spelling")
    strict_config: bool = _config(False, "unknown keys are errors everywhere", grade="ours")
    output_config: bool = _config(
        False,
        "write the given options to the config file's path and stop",
        grade="S",
    )


@dataclass(frozen=True)
class ForeignOptions:
    """Of the hub and of DeepSpeed."""

    huggingface_repo_id: str | None = _hub(None, "repository", no_effect=_ONE_UPLOAD)
    huggingface_repo_type: str | None = _hub(None, "its type", no_effect=_ONE_UPLOAD)
    huggingface_path_in_repo: str | None = _hub(None, "path in it", no_effect=_ONE_UPLOAD)
    huggingface_token: str | None = _hub(None, "token", no_effect=_ONE_UPLOAD)
    huggingface_repo_visibility: str | None = _hub(None, "visibility", no_effect=_ONE_UPLOAD)
    save_state_to_huggingface: bool = _hub(False, "upload states", no_effect=_ONE_UPLOAD)
    resume_from_huggingface: bool = _hub(
        False, "download a state", no_effect="states are local folders"
    )
    async_upload: bool = _hub(False, "upload beside training", no_effect=_ONE_UPLOAD)
    deepspeed: bool = _deepspeed(False, "use DeepSpeed")
    zero_stage: int = _deepspeed(2, "ZeRO stage")
    offload_optimizer_device: str | None = _deepspeed(None, "where optimizer state goes")
    offload_optimizer_nvme_path: str | None = _deepspeed(None, "folder for it")
    offload_param_device: str | None = _deepspeed(None, "where parameters go")
    offload_param_nvme_path: str | None = _deepspeed(None, "folder for them")
    zero3_init_flag: bool = _deepspeed(False, "ZeRO 3 initialisation")
    zero3_save_16bit_model: bool = _deepspeed(False, "ZeRO 3 saving")
    fp16_master_weights_and_gradients: bool = _deepspeed(False, "fp16 master weights")
