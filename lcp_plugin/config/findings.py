"""What the reading of a configuration finds: problems, all of them at once, and notices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

# keys that other tools write beside kohya's own -> what to use here ("" if there is nothing)
FOREIGN_KEYS: dict[str, str] = {
    "epoch": "max_train_epochs",
    "optimizer": "optimizer_type",
    "lr_warmup": "lr_warmup_steps",
    "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "max_resolution": "resolution",
    "conv_dim": "network_args",
    "conv_alpha": "network_args",
    "rank_dropout": "network_args",
    "module_dropout": "network_args",
    "block_dims": "network_args",
    "block_alphas": "network_args",
    "down_lr_weight": "network_args",
    "mid_lr_weight": "network_args",
    "up_lr_weight": "network_args",
    "stop_text_encoder_training": "network_train_unet_only",
    "train_unet_only": "network_train_unet_only",
    "positive_prompts": "sample_prompts",
    "negative_prompts": "sample_prompts",
    "num_cpu_threads_per_process": "",
    "noise_offset_type": "",
    "model_list": "",
    "model_train_type": "",
    "lora_type": "",
    "lycoris_preset": "",
    "sdxl": "",
    "gpu_ids": "",
    "multi_gpu": "",
    "num_machines": "",
    "num_processes": "",
    "main_process_port": "",
    "additional_parameters": "",
    "extra_accelerate_launch_args": "",
    "no_token_padding": "",
    "gradient_accumulation": "gradient_accumulation_steps",
    "enable_preview": "",
    "use_wandb": "log_with",
    "save_as_bool": "",
}


@dataclass
class Findings:
    """Collects problems (errors in the end) and notices (one line each, told once)."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, source: str, text: str) -> None:
        """An error in `source`, a file or "command line"."""
        self.problems.append(f"{source}: {text}" if source else text)

    def notice(self, text: str) -> None:
        """Something the user should know, once."""
        if text not in self.notices:
            self.notices.append(text)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """' Did you mean x?' or ''."""
    nearest = closest(name, known, cutoff)
    return f" Did you mean {nearest}?" if nearest else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The most similar known name, '' if none is."""
    if FOREIGN_KEYS.get(name.lower()):
        return FOREIGN_KEYS[name.lower()]
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=cutoff)
    return found[0] if found else ""
