"""Options that follow from others are settled, those that contradict each other are reported.

What kohya's tools refuse with an assertion is resolved here where only one meaning makes sense,
with a notice; defaults that are unfit for SDXL stay kohya's and are pointed out once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lcp_plugin.config.convert import Unfit, parse_bytes
from lcp_plugin.config.findings import Findings, did_you_mean
from lcp_plugin.config.names import LONGEST_NAME, is_fit_anywhere
from lcp_plugin.config.optimizer_table import OPTIMIZER_NAMES, find_optimizer, finds_its_rate
from lcp_plugin.config.options import Options, option_fields
from lcp_plugin.config.prompts import read_prompts
from lcp_plugin.config.rates import PartRates, lora_plus_ratio
from lcp_plugin.config.samplers import FROM_PURE_NOISE
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import agree

_EXPORT = re.compile(r"^(lora(:[1-9]\d*)?|diff|diffusers|peft|checkpoint)$")
_PICKLED = ("optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_*.pkl")


def settle_options(
    options: Options, given: frozenset[str], continual: bool, findings: Findings
) -> tuple[Options, dict[str, str]]:
    """The options with everything that follows from others, and where those came from.

    `given`: options that some source set. `continual`: the config has [[tasks]].
    """
    implied: dict[str, tuple[Any, str]] = {}
    if options.seed is None:
        implied["seed"] = (42, "default")
    implied |= _settle_network(options, given, continual)
    implied |= _settle_optimizer(options, findings)
    implied |= _settle_caches(options, findings)
    if options.caption_extention and "caption_extension" not in given:
        implied["caption_extension"] = (options.caption_extention, "caption_extention")
    if not continual and "samples_per_task" not in given:
        implied["samples_per_task"] = (0, "implied: no [[tasks]]")
    if (options.xformers and "sdpa" not in given) and options.sdpa:
        implied["sdpa"] = (False, "implied by xformers")
    if options.ddp_static_graph and any(
        a.startswith("module_dropout") for a in options.network_args
    ):
        implied["ddp_static_graph"] = (False, "set aside: module_dropout")
        findings.notice("ddp_static_graph is set aside: module_dropout changes the graph.")
    if options.save_model_as != "safetensors":
        implied["save_model_as"] = ("safetensors", "pickles are not written")
        findings.notice(f"save_model_as = {options.save_model_as}: a pickle; saved as safetensors.")
    _tell_overruled(options, findings)
    _tell_no_effect(options, given, findings)
    _tell_unfit_defaults(options, given, findings)
    settled = replace(options, **{name: value for name, (value, _) in implied.items()})
    return settled, {name: origin for name, (_, origin) in implied.items()}


def _settle_network(
    options: Options, given: frozenset[str], continual: bool
) -> dict[str, tuple[Any, str]]:
    implied: dict[str, tuple[Any, str]] = {}
    if options.network_module:
        origin = f"implied by network_module = {options.network_module}"
        if "lora_targets" not in given:
            implied["lora_targets"] = ("transformer", origin)
        if "lora_init" not in given:
            implied["lora_init"] = ("kaiming", origin)
        return implied
    rates = options.text_encoder_lr or options.text_encoder_lr1 or options.text_encoder_lr2
    asked = rates or options.network_train_text_encoder_only
    if "network_train_unet_only" not in given and not asked:
        implied["network_train_unet_only"] = (True, "implied: network_module is unset")
    return implied


def settle_rates(options: Options, findings: Findings) -> Options:
    """A task's options with what follows from its own optimizer, schedule and rates."""
    implied = _settle_optimizer(options, findings)
    return replace(options, **{name: value for name, (value, _) in implied.items()})


def _settle_optimizer(options: Options, findings: Findings) -> dict[str, tuple[Any, str]]:
    implied: dict[str, tuple[Any, str]] = {}
    if not options.optimizer_type:
        old = "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else ""
        implied["optimizer_type"] = (old or "AdamW", "implied by an old flag" if old else "default")
    if options.lr_scheduler == "constant" and options.lr_warmup_steps > 0:
        implied["lr_scheduler"] = ("constant_with_warmup", "implied by lr_warmup_steps")
    if options.text_encoder_lr1 is not None or options.text_encoder_lr2 is not None:
        first, second = _two_rates(options)
        one = first if options.text_encoder_lr1 is None else options.text_encoder_lr1
        two = second if options.text_encoder_lr2 is None else options.text_encoder_lr2
        implied["text_encoder_lr"] = ((one, two), "text_encoder_lr1, text_encoder_lr2")
    if len(options.text_encoder_lr) > 2:
        findings.problem(
            "", f"text_encoder_lr = {options.text_encoder_lr}: wanted one rate or two."
        )
    return implied


def _two_rates(options: Options) -> tuple[float, float]:
    given = options.text_encoder_lr or (options.learning_rate,)
    return given[0], given[-1]


def _settle_caches(options: Options, findings: Findings) -> dict[str, tuple[Any, str]]:
    """Latent and text-encoder caches; kohya asserts where these contradict other options."""
    implied: dict[str, tuple[Any, str]] = {}
    if options.cache_latents_to_disk and not options.cache_latents:
        implied["cache_latents"] = (True, "implied by cache_latents_to_disk")
    if options.cache_text_encoder_outputs_to_disk and not options.cache_text_encoder_outputs:
        implied["cache_text_encoder_outputs"] = (
            True,
            "implied by cache_text_encoder_outputs_to_disk",
        )
    return implied


def _tell_overruled(options: Options, findings: Findings) -> None:
    """What another option overrules, or costs more than its user may know."""
    smaller = options.base_dtype not in ("auto", options.mixed_precision)
    if (options.fp8_base or options.fp8_base_unet or smaller) and options.carry_as == "fuse":
        name = "base_dtype" if smaller else "fp8_base"
        findings.notice(
            f"carry_as = fuse does not hold with {name}: storing the weights would round the "
            "carried delta away, so it rides along unfused."
        )
    if not (options.sdpa or options.xformers or options.mem_eff_attn):
        findings.notice(
            "sdpa = false: attention by plain matrix products, slower and with more memory; leave "
            "sdpa out for PyTorch's own."
        )


def _tell_no_effect(options: Options, given: frozenset[str], findings: Findings) -> None:
    reasons: dict[str, list[str]] = {}
    for name, field in option_fields().items():
        reason = field.metadata["no_effect"]
        if reason and name in given and getattr(options, name) != field.default:
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        verb = agree(len(names), "has", "have")
        findings.notice(f"{', '.join(names)} {verb} no effect here: {reason}.")


def _check_optimizer(options: Options, findings: Findings, problem: Any) -> None:
    """Known, installed, and with rates that it can take."""
    kind = options.optimizer_type
    known = find_optimizer(kind)
    if known is None and "." not in kind:
        hint = did_you_mean(kind, OPTIMIZER_NAMES)
        problem("optimizer_type", f"= {kind!r} is no optimizer known here.{hint}")
    package = known.package if known is not None else ""
    if package and importlib.util.find_spec(package) is None:
        problem(
            "optimizer_type",
            f"= {kind!r} needs the package {package}; pip install {package}, or use AdamW8bit.",
        )
    if finds_its_rate(kind):
        _check_one_rate(options, findings, problem)


def _check_one_rate(options: Options, findings: Findings, problem: Any) -> None:
    """What an optimizer that finds its rate itself can be given: one rate for all factors."""
    kind, rates = options.optimizer_type, _rates_of_parts(options)
    if len(rates) > 1:
        problem(
            "optimizer_type",
            f"= {kind!r} takes one rate for all parts, got {' and '.join(map(str, rates))}; "
            "leave out unet_lr and text_encoder_lr and set learning_rate = 1.",
        )
    elif rates[0] <= 0.1:
        findings.notice(
            f"{kind} finds its rate itself and multiplies it by learning_rate = {rates[0]}; "
            "1 is usual."
        )
    every = _rates_of_factors(options) or rates
    if every != rates and len(every) > 1:
        given = [text.partition("=")[0].strip() for text in options.network_args]
        keys = [key for key in given if key.startswith("loraplus_") or key.endswith("_lr_weight")]
        problem(
            "optimizer_type",
            f"= {kind!r} takes one rate for all, got {' and '.join(map(str, every))}; "
            f"leave out {' and '.join(keys)} of network_args.",
        )


def _rates_of_parts(options: Options) -> list[float]:
    """The distinct rates of what is trained, as far as options say; 0 trains nothing."""
    rates = {rate for rate in asdict(PartRates.of(options)).values() if rate > 0}
    return sorted(rates) or [options.learning_rate]


def _rates_of_factors(options: Options) -> list[float]:
    """The distinct rates of A and B, which block weights and LoRA+ change; none where network_args
    cannot be read.
    """
    try:
        args = options.network
    except ConfigError:  # told by the check of network_args
        return []
    found: set[float] = set()
    for part, rate in asdict(PartRates.of(options)).items():
        weights = args.adapted_weights if part == "unet" else (1.0,)
        ratio = lora_plus_ratio(f"{part}.", args)
        found |= {rate * weight * factor for weight in weights for factor in (1.0, ratio)}
    return sorted(found - {0.0})


def _tell_unfit_defaults(options: Options, given: frozenset[str], findings: Findings) -> None:
    """kohya's defaults that hold because nothing else was said, and that SDXL rarely wants."""
    advice = []
    if not given & {"learning_rate", "unet_lr"} and "adafactor" not in (
        options.optimizer_type.lower(),
        options.lr_scheduler,
    ):
        advice.append("learning_rate = 2e-6 (1e-5 to 1e-4 is usual)")
    if "network_dim" not in given and not options.network_weights:
        advice.append("network_dim = 4 (8 to 64 is usual)")
    if "network_alpha" not in given and options.rank > 1 and not options.network_weights:
        advice.append(f"network_alpha = 1 (updates are scaled by 1/{options.rank})")
    if options.enable_bucket and not given & {"max_bucket_reso", "bucket_no_upscale"}:
        advice.append("max_bucket_reso = 1024 (2048 lets wide pictures keep their shape)")
    if advice:
        findings.notice(f"kohya's defaults, seldom right for SDXL, hold: {'; '.join(advice)}.")


def check_options(
    options: Options, provenance: Mapping[str, str], findings: Findings, where: str = ""
) -> None:
    """Problems of options that do not fit together or are missing."""

    def problem(key: str, text: str) -> None:
        source = provenance.get(key, "")
        findings.problem(source, f"{where}.{key} {text}" if where else f"{key} {text}")

    _check_optimizer(options, findings, problem)
    if options.adaptive_noise_scale and options.noise_offset is None:
        problem("adaptive_noise_scale", "needs noise_offset; give both or none.")
    try:
        for notice in options.network.notices:
            findings.notice(notice)
    except ConfigError as error:
        for text in error.problems:
            findings.problem(provenance.get("network_args", where), text)
    if options.network_dropout == 1:
        problem("network_dropout", "= 1 drops everything; give a share below 1.")
    _check_timesteps(options, problem)
    _check_prediction(options, problem)
    if not where:
        _check_run(options, problem)


def _check_timesteps(options: Options, problem: Any) -> None:
    low, high = options.min_timestep or 0, options.max_timestep or 1000
    if low > high:
        problem("min_timestep", f"= {low} is above max_timestep = {high}; exchange them.")


def _check_prediction(options: Options, problem: Any) -> None:
    if options.v_parameterization and options.v_pred_like_loss:
        problem("v_pred_like_loss", "is for epsilon-prediction; leave it out with v-prediction.")


def _check_run(options: Options, problem: Any) -> None:
    if not options.pretrained_model_name_or_path:
        problem(
            "pretrained_model_name_or_path",
            "is missing: wanted a diffusers folder, a hub id, a .safetensors file or tiny-sdxl.",
        )
    for full, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if getattr(options, full) and options.mixed_precision != needed:
            problem(full, f"needs mixed_precision = {needed}, not {options.mixed_precision}.")
    if options.dim_from_weights and not options.network_weights:
        problem("dim_from_weights", "needs network_weights: the file to take the ranks from.")
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        problem("network_train_unet_only", "and network_train_text_encoder_only leave nothing.")
    if len(options.base_weights_multiplier) > len(options.base_weights):
        problem("base_weights_multiplier", "has more values than base_weights has files.")
    if (
        options.sample_every_n_steps or options.sample_every_n_epochs
    ) and not options.sample_prompts:
        problem("sample_prompts", "is missing: sample_every_n_... needs a file of prompts.")
    _check_files(options, problem)
    _check_resume(options, problem)
    _check_sampler(options, problem)
    name = options.output_name or ""
    if not is_fit_anywhere(name) or len(name) > LONGEST_NAME:
        problem("output_name", f"= {name!r} is unfit as a file name; the folder is output_dir.")


def _check_files(options: Options, problem: Any) -> None:
    for name in (options.network_weights, *options.base_weights):
        if name and not Path(name).exists():
            key = "network_weights" if name == options.network_weights else "base_weights"
            problem(key, f"= {name!r} does not exist; correct the path of the LoRA file.")
    if options.sample_prompts:
        try:
            prompts = read_prompts(options.sample_prompts)
            samplers = {p.sample_sampler for p in prompts if p.sample_sampler}
            if options.zero_terminal_snr and samplers - set(FROM_PURE_NOISE):
                problem("sample_prompts", cannot_start(samplers - set(FROM_PURE_NOISE)))
        except ConfigError as error:
            problem("sample_prompts", f"= {options.sample_prompts!r}: {error}")
    if options.max_file_size:
        try:
            parse_bytes(options.max_file_size)
        except Unfit as error:
            problem("max_file_size", f"= {options.max_file_size!r}: {error}.")
    for form in options.export:
        if not _EXPORT.match(form):
            problem(
                "export",
                f"= {form!r}: wanted lora:RANK, diff, diffusers, peft or checkpoint.",
            )


def cannot_start(samplers: Iterable[str]) -> str:
    """Why a prompt file's samplers do not go with a base whose last step is pure noise."""
    return (
        f"asks for {', '.join(sorted(samplers))}, which cannot start from pure noise as "
        f"zero_terminal_snr needs; use {', '.join(FROM_PURE_NOISE)}."
    )


def _check_sampler(options: Options, problem: Any) -> None:
    name = options.sample_sampler
    if name.endswith("lms") and importlib.util.find_spec("scipy") is None:
        problem("sample_sampler", f"= {name!r} needs the package scipy; install it or use euler.")
    if options.zero_terminal_snr and name not in FROM_PURE_NOISE:
        problem(
            "sample_sampler",
            f"= {name!r} cannot start from pure noise, as zero_terminal_snr needs; "
            f"use {', '.join(FROM_PURE_NOISE)}.",
        )


def _check_resume(options: Options, problem: Any) -> None:
    if not options.resume:
        return
    folder = Path(options.resume)
    if not folder.is_dir():
        problem("resume", f"= {options.resume!r} is not a folder; the same command resumes anyway.")
    elif any(any(folder.glob(pattern)) for pattern in _PICKLED):
        problem(
            "resume",
            f"= {options.resume!r} is a state that kohya's tools pickled; unpickling runs code, so "
            f"it is not read. Go on from its LoRA file with network_weights or prev.",
        )
    elif not (folder / "state.json").is_file():
        problem("resume", f"= {options.resume!r} holds no state.json; name a state of this tool.")
