"""What a configuration says above its tasks: what the run is, and how every task is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lcp_plugin.errors import ConfigError
from lcp_plugin.hooks import Strategy
from lcp_plugin.initial import choices, draft
from lcp_plugin.initial.chain import FORM, Chain
from lcp_plugin.initial.draft import Line
from lcp_plugin.initial.survey import Survey
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.telling.wording import agree, counted

OUTPUT = Path("output")
RECALL = "recall"
COST = "rehearses what was learned, for about twice the time; merge_init does not"
ASK = 'its header does not say what it knows: fill in, as ["a photo of sks dog"]'


@dataclass(frozen=True)
class Request:
    """What the command line says."""

    photos: Path
    output: Path | None = None  # unset: the folder's name in the current folder
    base: str | None = None
    kinds: tuple[str, ...] = ()
    preset: str | None = None
    strategy: str | None = None  # unset: the chain's, else recall
    prev: Path | None = None

    @cached_property
    def file(self) -> Path:
        """The configuration to write. One that goes on from a chain finds a name that is free."""
        name = draft.fit_name(self.photos.resolve().name) or "photos"
        if self.output or self.prev is None:
            return self.output or Path(f"{name}.toml")
        return Path(f"{free_name(name, lambda n: Path(f'{n}.toml').exists())}.toml")


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """The name, or with the first number behind it that makes it free."""
    return next(n for n in _names_like(name) if not is_taken(n))


def _names_like(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1


def run_lines(request: Request, base: choices.Choice, chain: Chain | None) -> list[Line]:
    """What the run is: its base, what it goes on from, its strategy, where it goes."""
    stem = draft.fit_name(request.file.stem) or "photos"
    name = free_name(stem, lambda n: (OUTPUT / n).exists()) if chain else stem
    return [
        Line("pretrained_model_name_or_path", base.value, base.why),
        *_chain_lines(request, chain),
        *_strategy_lines(request.strategy, chain),
        Line("output_dir", OUTPUT.as_posix()),
        Line("output_name", name, f"the LoRA will be {OUTPUT.as_posix()}/{name}.safetensors"),
        Line("seed", 0),
    ]


def _chain_lines(request: Request, chain: Chain | None) -> list[Line]:
    if chain is None:
        return []
    place = request.file.absolute().parent
    return [Line("prev", draft.path_from(place, chain.path), "the LoRA will hold its tasks too")]


def _strategy_lines(given: str | None, chain: Chain | None) -> list[Line]:
    """The strategy, the chain's unless another is asked for, and what it needs of the chain."""
    chained = chain.strategy if chain else None
    name = given or chained or RECALL
    told = COST if name == RECALL else ""
    if chain is None:
        return [Line("strategy", name, told)]
    if name == chained:
        args = [Line("strategy_args", list(chain.strategy_args))] if chain.strategy_args else []
        return [Line("strategy", name, "the chain's"), *args]
    lines = [Line("strategy", name, told)]
    if chained:
        lines.append(Line("allow_strategy_change", True, f"the chain was made with {chained}"))
    if chain.is_foreign and type(create_strategy(name, ())).rehearse is not Strategy.rehearse:
        why = "what it knows by its header, and is rehearsed by; put right what is not so"
        lines.append(Line("prev_prompts", list(chain.prompts), why if chain.prompts else ASK))
    return lines


def form_lines(chain: Chain | None, base: str) -> list[Line]:
    """What shapes the factors: the chain's rank and alpha, where it has them, else the base's."""
    if chain is not None and chain.form:
        why = "the chain's"
        return [Line(name, chain.form[name], why) for name in FORM if name in chain.form]
    if base == TINY_NAME:
        outlines = Line(
            "network_args", ["conv_dim=16", "conv_alpha=16"], "outlines are convolutions'"
        )
        return [Line("network_dim", 16), Line("network_alpha", 16), outlines]
    return [
        Line("network_dim", choices.RANK, "rank of a task's factors"),
        Line("network_alpha", choices.RANK),
    ]


def recipe_lines(
    request: Request, base: str, form: Sequence[Line], found: Survey, free_gb: float | None
) -> list[Line]:
    """How every task is trained, on the embedded base or on SDXL."""
    if base == TINY_NAME:
        if request.preset:
            raise ConfigError(f"--preset {request.preset}: is for SDXL; {TINY_NAME} needs none.")
        return [
            *form,
            Line("optimizer_type", "AdamW"),
            Line("learning_rate", 1.6e-3, "as in configs/photos.toml, chosen for this base"),
            Line("lr_scheduler", "constant"),
            Line("train_batch_size", 4),
            Line("cache_latents", True),
            Line("cache_text_encoder_outputs", True),
            Line("samples_per_task", 1),
            Line("sample_steps", 12),
            Line("guidance_scale", 1.5),
            Line("evaluate", ["effnet"], "says at the end what is still recognised"),
            Line("evaluate_images", 2),
            Line("evaluate_prompts", 2),
        ]
    rank = next((line.value for line in form if line.key == "network_dim"), choices.RANK)
    preset = choices.choose_preset(request.preset, free_gb, int(str(rank)))
    return [
        Line("preset", preset.value, preset.why),
        *_precision(free_gb),
        *form,
        Line("learning_rate", 1e-4),
        Line("lr_scheduler", "constant"),
        *_sizes(base, found),
        Line("samples_per_task", 1, "images of every task so far behind each task"),
    ]


def _precision(free_gb: float | None) -> list[Line]:
    """fp16 where a preset's bf16 is unknown to the card."""
    import torch

    if free_gb is None or torch.cuda.is_bf16_supported():
        return []
    return [Line("mixed_precision", "fp16", "this card has no bf16")]


def _sizes(base: str, found: Survey) -> list[Line]:
    from lcp_plugin.sdxl.traits import SDXL_SIDE, is_at_hand, read_traits

    native = read_traits(base).native_side if is_at_hand(base) else SDXL_SIDE
    sizes = [size for photos in found.tasks for size in photos.sizes]
    side = choices.choose_side(sizes, native)
    lines = [] if side is None else [Line("resolution", side.value, side.why)]
    oblong = choices.count_oblong(sizes)
    if oblong:
        images, verb = counted(len(sizes), "image"), agree(oblong, "is", "are")
        why = f"{oblong} of {images} {verb} not square, and kept whole"
        lines.append(Line("enable_bucket", True, why))
    return lines
