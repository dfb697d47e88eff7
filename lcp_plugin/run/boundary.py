"""What follows a task that is complete on disk: deliverable, samples, run.json, on_task_end.

Each happens once, in this order; a run that was killed in between goes on with what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lcp_plugin.formats.checked_lora import TOLERANCE, write_checked_lora
from lcp_plugin.formats.lora_file import BIAS_READERS, portable_adapter
from lcp_plugin.formats.precisions import SAVED_AS
from lcp_plugin.hooks import Carry
from lcp_plugin.run.context import Context
from lcp_plugin.run.samples import BASE_STAGE, SamplePlan, draw_grid, sample_stage
from lcp_plugin.store.carries import deliverable_adapter, hash_carry, hashing
from lcp_plugin.store.deliverable_header import make_header
from lcp_plugin.store.task_folder import TaskFolder
from lcp_plugin.tasks import TaskRecord

if TYPE_CHECKING:
    from PIL.Image import Image


def finish_boundaries(run: Context, newest: Carry | None = None) -> None:
    """All boundaries whose on_task_end is not noted as done; main process only.

    `newest`: the carry behind the last task, if it need not be read from disk again. A dense
    carry takes gigabytes: the model leaves the older one before anything else is formed.
    """
    ended = set(run.facts["ended"])
    pending = [f for f in run.store.folders() if f.index not in ended]
    for folder in pending:
        last = folder is pending[-1]
        kept = newest if last else None
        carry = kept or run.store.carry_after(folder.index)
        with hashing(carry) if last else nullcontext():
            run.base.show(carry.change)
        if last:
            deliver(run, carry)
        images = sample(run, folder.path.name, folder.records)
        task = next(t for t in run.tasks if t.index == folder.index)
        run.tell("on_sample", task, images)
        run.tell("on_task_end", task, carry)
        run.facts["ended"].append(folder.index)
        run.write_facts(status="running")


def deliver(run: Context, carry: Carry) -> None:
    """The deliverable, unless the one on disk records this very carry."""
    if run.store.delivered_hash() != hash_carry(carry):
        write_carry_as_lora(run, run.store.deliverable, carry, run.store.folders())
        if carry.biases:
            run.logbook.say(f"{run.store.deliverable.name} {BIAS_READERS}")


def write_carry_as_lora(
    run: Context, path: Path, carry: Carry, folders: Sequence[TaskFolder]
) -> None:
    """A carry as a LoRA file in the deliverable's form, read back before it counts."""
    adapter = portable_adapter(deliverable_adapter(carry))
    header = make_header(carry, adapter, folders, path.stem)
    dtype = SAVED_AS[run.options.save_precision or "float"]
    lost = write_checked_lora(path, adapter, header, dtype, carry.biases)
    if lost > TOLERANCE[dtype]:
        run.logbook.say(
            f"save_precision = {run.options.save_precision} cannot hold all of this LoRA: "
            f"up to {lost:.1%} of a module is rounded away; bf16 or float hold it."
        )


def sample_base(run: Context) -> None:
    """Before the first task: what the model makes of every task's prompts as yet."""
    if (run.store.root / "samples" / BASE_STAGE).is_dir() and run.facts["base_sampled"]:
        return
    run.base.show(run.plan.parent.carry.change)
    images = sample(run, BASE_STAGE, run.all_records)
    run.tell("on_sample", None, images)
    run.logbook.note(base_sampled=True)
    run.write_facts(status="running")


def draw_timed(
    run: Context, prompts: Sequence[str], seed: int, distinct: int | None
) -> list[Image]:
    """Samples, with run.json's note of how long they took: what scores will take is told by it."""
    began = time.monotonic()
    images = run.drawing.draw(prompts, seed, distinct)
    seconds = round(time.monotonic() - began, 3)
    run.logbook.note(drawing={"images": len(images), "seconds": seconds})
    return images


def sample(run: Context, stage: str, records: Sequence[TaskRecord]) -> dict[str, list[Image]]:
    """Images of the records at a stage, and the grid drawn anew."""
    if run.options.samples_per_task == 0:
        return {}
    folder = run.store.root / "samples"
    plan = SamplePlan(run.options.samples_per_task, run.options.sample_seed)
    facts = {"stage": stage, "run": run.name, "base": run.plan.base_id.hash}
    images = sample_stage(folder, stage, records, plan, partial(draw_timed, run), facts)
    stages = [(BASE_STAGE, "base")]
    stages += [(f.path.name, f"after {f.name}") for f in run.store.folders()]
    draw_grid(folder, run.all_records, stages)
    return images
