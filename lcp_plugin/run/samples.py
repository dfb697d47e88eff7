"""Sample images at every boundary, and the grid of tasks x stages that shows at a glance what was
forgotten.

    samples/00_base/<task>_0.png ... samples/03_watercolor/<task>_0.png ...  samples/grid.png

The same starting latents for every prompt and stage: what changes is the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcp_plugin.config.options import Options
from lcp_plugin.formats.disk import replacing
from lcp_plugin.formats.pictures import save_picture
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.sample import starting_latents
from lcp_plugin.tasks import TaskRecord

if TYPE_CHECKING:
    from PIL.Image import Image

BASE_STAGE = "00_base"
Sampler = Callable[[Sequence[str], int, int], "list[Image]"]  # prompts, seed, distinct latents


@dataclass(frozen=True)
class Drawing:
    """How a run draws its samples, from the live model as it is."""

    base: LiveBase
    size: tuple[int, int]  # pixels, (width, height)
    steps: int
    guidance: float
    texts_change: bool  # text encoders are trained: what they said a step ago no longer holds

    @classmethod
    def of(cls, options: Options, base: LiveBase) -> Drawing:
        """As the run's options ask for it."""
        size = options.resolution or (base.native_side,) * 2
        changes = options.trains_text_encoders
        return cls(base, size, options.sample_steps, options.guidance_scale, changes)

    def draw(self, prompts: Sequence[str], seed: int, distinct: int | None = None) -> list[Image]:
        """An image per prompt.

        `distinct` starting latents are drawn from the seed (one per prompt if None), used in turn.
        """
        if self.texts_change:
            self.base.bank.clear()
        width, height = self.size
        count = distinct or len(prompts)
        latents = starting_latents(self.base.pipeline, count, (height, width), seed)
        latents = latents[[i % count for i in range(len(prompts))]]
        return self.base.draw(prompts, latents, self.steps, self.guidance)


@dataclass(frozen=True)
class SamplePlan:
    """What is sampled of a task: `count` prompts, the training prompt first."""

    count: int
    seed: int

    def prompts(self, record: TaskRecord) -> list[str]:
        """The training prompt, then evaluation prompts in turn."""
        plain = record.train_prompt.replace("{class_name}", "a house")
        pool = [p for p in (plain, *record.prompts) if p]
        return [pool[i % len(pool)] for i in range(self.count)] if pool else []


def sample_stage(
    folder: Path,
    stage: str,
    records: Sequence[TaskRecord],
    plan: SamplePlan,
    sampler: Sampler,
    facts: Mapping[str, str],
) -> dict[str, list[Image]]:
    """Samples every record at a stage, or reads them where an earlier try left them all; by task
    name.
    """
    from PIL import Image as images

    paths = {
        record.name: [folder / stage / f"{record.name}_{i}.png" for i in range(len(prompts))]
        for record in records
        if (prompts := plan.prompts(record))
    }
    wanted = [
        (prompt, path)
        for record in records
        for prompt, path in zip(plan.prompts(record), paths.get(record.name, ()), strict=True)
    ]
    if all(path.is_file() for _, path in wanted):  # else all: a batch decides its images' last bits
        wanted = []
    drawn = sampler([prompt for prompt, _ in wanted], plan.seed, plan.count) if wanted else []
    for (prompt, path), image in zip(wanted, drawn, strict=True):
        save_picture(path, image, {"prompt": prompt, "seed": str(plan.seed), **facts})
    return {n: [images.open(p).convert("RGB") for p in found] for n, found in paths.items()}


def draw_grid(
    folder: Path, records: Sequence[TaskRecord], stages: Sequence[tuple[str, str]], cell: int = 144
) -> Path | None:
    """Rows are tasks, columns are stages (folder, label); the first sample of each cell that
    exists.

    Returns:
        samples/grid.png, or None where nothing was sampled.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    margin, head, gap = 150, 34, 6
    width = margin + len(stages) * (cell + gap) + gap
    height = head + len(records) * (cell + gap) + gap
    grid = images.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    font = _font(15)
    drawn = 0
    for column, (_, label) in enumerate(stages):
        left = margin + column * (cell + gap)
        draw.text((left, 9), _shorten(draw, label, cell, font), "#222222", font=font)
    for row, record in enumerate(records):
        top = head + row * (cell + gap)
        draw.text(
            (10, top + cell // 2 - 18),
            _shorten(draw, record.name, margin - 18, font),
            "#222222",
            font=font,
        )
        draw.text(
            (10, top + cell // 2 + 2),
            _shorten(draw, record.concept, margin - 18, font),
            "#888888",
            font=font,
        )
        for column, (stage, _) in enumerate(stages):
            left = margin + column * (cell + gap)
            path = folder / stage / f"{record.name}_0.png"
            if path.is_file():
                picture = (
                    images.open(path).convert("RGB").resize((cell, cell), images.Resampling.LANCZOS)
                )
                grid.paste(picture, (left, top))
                drawn += 1
            if stage.startswith(f"{record.index:02d}_"):  # where it was learned
                box = (left - 2, top - 2, left + cell + 1, top + cell + 1)
                draw.rectangle(box, outline="#d97706", width=2)
    if not drawn:
        return None
    with replacing(folder / "grid.png") as temporary:
        grid.save(temporary, format="PNG")
    return folder / "grid.png"


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _shorten(draw: Any, text: str, width: int, font: Any) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
