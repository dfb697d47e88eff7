"""Sample images at every boundary, and the grid of tasks x stages that shows at a glance what was
forgotten: by the eye at once, and once a run is scored by a cross on what no longer is recognised.

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
from lcp_plugin.sdxl.drawing import DrawSettings, starting_latents
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.tasks import TaskRecord

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcp_plugin.evaluation.recognition import Look

BASE_STAGE = "00_base"
Sampler = Callable[[Sequence[str], int, int], "list[Image]"]  # prompts, seed, distinct latents


@dataclass(frozen=True)
class SampleDrawing:
    """How a run draws its samples, from the live model as it is."""

    base: LiveBase
    size: tuple[int, int]  # pixels, (width, height)
    how: DrawSettings
    texts_change: bool  # text encoders are trained: what they said a step ago no longer holds

    @classmethod
    def of(cls, options: Options, base: LiveBase) -> SampleDrawing:
        """As the run's options ask for it."""
        size = options.resolution or (base.native_side,) * 2
        how = DrawSettings(options.sample_steps, options.guidance_scale)
        return cls(base, size, how, options.trains_text_encoders)

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
        return self.base.draw(prompts, latents, self.how)


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
    """Samples of every record at a stage by task name, read where an earlier try left them all."""
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
    folder: Path,
    records: Sequence[TaskRecord],
    stages: Sequence[tuple[str, str]],
    cell: int = 144,
    looks: Mapping[str, Mapping[str, Look]] | None = None,
) -> Path | None:
    """Rows are tasks, columns are stages (folder, label); of each cell its first sample, if any.

    Args:
        looks: what is recognised, stage folder -> task name; what no longer is gets crossed out,
            and a legend says so.
    Returns:
        samples/grid.png, or None where nothing was sampled.
    """
    grid = _Grid(len(records), len(stages), cell, legend=bool(looks))
    for column, (_, label) in enumerate(stages):
        grid.head(column, label)
    drawn = 0
    for row, record in enumerate(records):
        grid.name(row, record.name, record.concept)
        for column, (stage, _) in enumerate(stages):
            path = folder / stage / f"{record.name}_0.png"
            if path.is_file():
                grid.paste(row, column, path)
                drawn += 1
            look = (looks or {}).get(stage, {}).get(record.name)
            if stage.startswith(f"{record.index:02d}_"):  # where it was learned
                grid.frame(row, column)
            elif path.is_file() and look is not None and not look.is_recognised:
                grid.cross_out(row, column, look.other or "")
    if not drawn:
        return None
    with replacing(folder / "grid.png") as temporary:
        grid.image.save(temporary, format="PNG")
    return folder / "grid.png"


def mark_grid(run: Path) -> Path | None:
    """Draws a run's grid anew with what its scores say of every concept after every task.

    Returns:
        samples/grid.png; None, and nothing is touched, where samples or scores are missing.
    """
    from lcp_plugin.report.material import recognised_stages
    from lcp_plugin.report.read import find_scores, read_run, read_scores

    facts, folder = read_run(run), run / "samples"
    looks = recognised_stages(read_scores(find_scores(run)), facts)
    if not looks or not (folder / "grid.png").is_file():
        return None
    records = [TaskRecord(t.index, t.name, t.kind, t.concept) for t in facts.tasks]
    stages = [(BASE_STAGE, "base")]
    for link in facts.lineage:
        task = TaskRecord.from_json(link["task"])
        stages.append((f"{task.index:02d}_{task.name}", f"after {task.name}"))
    return draw_grid(folder, records, stages, looks=looks)


MARGIN, HEAD, GAP, FOOT = 150, 34, 6, 26  # pixels around the cells
INK, SOFT, FRAME = "#222222", "#888888", "#d97706"
LEGEND = "not recognised in the images of the evaluation's prompts; below, what those look like"


class _Grid:
    """The picture, cell by cell."""

    def __init__(self, rows: int, columns: int, cell: int, legend: bool) -> None:
        from PIL import Image as images
        from PIL import ImageDraw, ImageFont

        self.cell = cell
        width = MARGIN + columns * (cell + GAP) + GAP
        height = HEAD + rows * (cell + GAP) + GAP + (FOOT if legend else 0)
        self.image = images.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font: Any = ImageFont.load_default(15)
        if legend:
            self._cross(10, height - FOOT, 20)
            text = self._shorten(LEGEND, width - 48)
            self.draw.text((38, height - FOOT + 2), text, INK, font=self.font)

    def head(self, column: int, label: str) -> None:
        """Names a stage."""
        left, _ = self._place(0, column)
        self.draw.text((left, 9), self._shorten(label, self.cell), INK, font=self.font)

    def name(self, row: int, name: str, concept: str) -> None:
        """Names a task."""
        _, top = self._place(row, 0)
        for text, below, colour in ((name, -18, INK), (concept, 2, SOFT)):
            place = (10, top + self.cell // 2 + below)
            self.draw.text(place, self._shorten(text, MARGIN - 18), colour, font=self.font)

    def paste(self, row: int, column: int, path: Path) -> None:
        """A sample into its cell."""
        from PIL import Image as images

        picture = images.open(path).convert("RGB")
        size = (self.cell, self.cell)
        self.image.paste(picture.resize(size, images.Resampling.LANCZOS), self._place(row, column))

    def frame(self, row: int, column: int) -> None:
        """Where it was learned."""
        left, top = self._place(row, column)
        box = (left - 2, top - 2, left + self.cell + 1, top + self.cell + 1)
        self.draw.rectangle(box, outline=FRAME, width=2)

    def cross_out(self, row: int, column: int, other: str) -> None:
        """A concept that is no longer recognised: a cross in a corner, below it what it looks like.

        Black and white, and large enough to be seen where the grid is a thumbnail.
        """
        left, top = self._place(row, column)
        self._cross(left, top, self.cell // 3)
        if other:
            low = top + self.cell
            self.draw.rectangle((left, low - 22, left + self.cell - 1, low - 1), fill="black")
            text = self._shorten(f"like {other}", self.cell - 10)
            self.draw.text((left + 6, low - 20), text, "white", font=self.font)

    def _cross(self, left: int, top: int, side: int) -> None:
        self.draw.rectangle((left, top, left + side, top + side), fill="black", outline="white")
        near, far = side * 0.24, side * 0.76
        width = max(2, side // 7)
        for x, y in ((near, far), (far, near)):
            self.draw.line((left + near, top + x, left + far, top + y), "white", width)

    def _place(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a cell."""
        step = self.cell + GAP
        return MARGIN + column * step, HEAD + row * step

    def _shorten(self, text: str, width: int) -> str:
        if self.draw.textlength(text, font=self.font) <= width:
            return text
        while text and self.draw.textlength(text + "…", font=self.font) > width:
            text = text[:-1]
        return text + "…"
