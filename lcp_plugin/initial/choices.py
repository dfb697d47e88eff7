"""What the machine and the photos decide: base, preset, size, steps; each with its reason.

Steps. On SDXL each image is seen 100 times at a rate of 1e-4: ten repeats (kohya's `10_sks dog`)
in ten epochs, as in sd-scripts' guide (docs/train_network.md). Never below 500, which diffusers'
DreamBooth example for SDXL takes for five photos, nor above 4,000, the end of ai-toolkit's range.
On tiny-sdxl 200 steps of 4 for six photos, where three photographed subjects learned one after
another were recognised better than each alone with 100 (docs/recall.md), and 120 steps of 4 for 24
drawings, as in configs/five_styles.toml. A folder named `20_...` counts twice, `5_...` half.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lcp_plugin.errors import ConfigError
from lcp_plugin.initial.chain import Chain
from lcp_plugin.initial.survey import Photos
from lcp_plugin.sdxl.load import TINY_NAME
from lcp_plugin.tasks import Kind
from lcp_plugin.telling.wording import counted

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
RANK = 32  # on SDXL
USUAL_REPEATS = 10  # of kohya's folder names: what "once" means for the rule
LEAST_SIDE = 768  # pixels; half of SDXL's own size is far from what it was trained at
SQUARE = 1.1  # sides that differ by less are cut to a square
PRESETS = ("8gb", "12gb", "24gb")
UNKNOWN_CARD = "12gb"


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: str
    why: str


@dataclass(frozen=True)
class StepRule:
    """Steps from images: `views` of each image in all, in batches, within limits."""

    views: int
    batch: int
    least: int
    most: int

    def count(self, images: float) -> tuple[int, bool]:
        """Steps for so many images, rounded to tens, and whether a limit has changed them."""
        steps = round(images * self.views / self.batch / 10) * 10
        held = min(max(steps, self.least), self.most)
        return held, held != steps


SDXL_STEPS = StepRule(views=100, batch=1, least=500, most=4000)
TINY_STEPS: dict[Kind, StepRule] = {
    "object": StepRule(views=130, batch=4, least=120, most=250),
    "style": StepRule(views=20, batch=4, least=100, most=250),
}


def choose_base(given: str | None, free_gb: float | None, chain: Chain | None = None) -> Choice:
    """The base: what was given, the chain's, else SDXL with a GPU and the embedded one without."""
    if given:
        return Choice(given, "as given by --base")
    if chain is not None and chain.base:
        return Choice(chain.base, "the base of the chain that it goes on from")
    if chain is not None:
        return Choice(SDXL, f"{chain.path.name} does not name its base: check that it is this one")
    if free_gb is None:
        why = f"no GPU here; with one: {SDXL}, a folder or a .safetensors file"
        return Choice(TINY_NAME, why)
    return Choice(SDXL, "or a diffusers folder, or a .safetensors file, or a hub id")


def choose_preset(given: str | None, free_gb: float | None, rank: int = RANK) -> Choice:
    """The most generous preset that fits into the free memory, as `lcp doctor` finds it."""
    from lcp_plugin.doctor import machine

    if given:
        if given not in PRESETS:
            raise ConfigError(f"--preset {given}: wanted one of {', '.join(PRESETS)}.")
        return Choice(given, "as given by --preset")
    if free_gb is None:
        return Choice(UNKNOWN_CARD, "of the card that will train; none is here. Or 8gb, 24gb")
    memories = [
        machine.preset_memory(preset, machine.preset_options(preset, rank)) for preset in PRESETS
    ]
    fitting = machine.choose_preset(memories, free_gb)
    if fitting is None:
        need = f"{memories[0].total:.1f} GB at 1024 px"
        return Choice(PRESETS[0], f"{free_gb:.1f} GB are free, and it takes about {need}")
    return Choice(fitting.preset, f"about {fitting.total:.1f} of {free_gb:.1f} GB free here")


def count_steps(photos: Photos, kind: Kind, base: str) -> tuple[int, str]:
    """Steps of a task, and the rule in words."""
    rule = TINY_STEPS[kind] if base == TINY_NAME else SDXL_STEPS
    usual = USUAL_REPEATS
    alike = sum(len(s.images) * (s.repeats or usual) for s in photos.shelves) / usual
    steps, is_held = rule.count(alike)
    images = counted(len(photos.images), "image")
    if photos.has_repeats:
        images = f"{images} with repeats like {alike:g} at {usual}"
    told = f"{images} x {counted(rule.views, 'view')}"
    told += f" / batch {rule.batch}" if rule.batch > 1 else ""
    told += f", within {rule.least} to {rule.most}" if is_held else ""
    return steps, told


def choose_side(sizes: Sequence[tuple[int, int]], native: int) -> Choice | None:
    """Pixels to train at where photos are smaller than the base's own size; None: its own."""
    middle = statistics.median((width * height) ** 0.5 for width, height in sizes)
    side = max(int(middle) // 64 * 64, min(LEAST_SIDE, native))
    if side >= native:
        return None
    return Choice(f"{side},{side}", f"photos have about {middle:.0f} px a side")


def count_oblong(sizes: Sequence[tuple[int, int]]) -> int:
    """How many pictures are not square."""
    return sum(max(size) > SQUARE * min(size) for size in sizes)
