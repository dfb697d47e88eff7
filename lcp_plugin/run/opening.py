"""Between the plan and the first task: processes, the model, the parent, room on the disk."""

from __future__ import annotations

from dataclasses import replace

from lcp_plugin.config.logs import tracker_settings
from lcp_plugin.config.options import Options
from lcp_plugin.formats.disk import require_free_space
from lcp_plugin.run.context import Context
from lcp_plugin.run.network_weights import going_on, parent_of
from lcp_plugin.run.plan import RunPlan
from lcp_plugin.run.session import without_collecting
from lcp_plugin.run.trackers import usable_trackers
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.live_base import LiveBase, build_live_base
from lcp_plugin.sdxl.live_biases import check_biases
from lcp_plugin.sdxl.load import load_pipeline
from lcp_plugin.sdxl.precision import Precision
from lcp_plugin.training.lesson import Classroom
from lcp_plugin.training.modules import select_modules
from lcp_plugin.training.processes import Processes, create_accelerator


def start_processes(options: Options) -> Processes:
    """This process among those that the launcher started, with the trackers that are asked for."""
    trackers = tracker_settings(options)
    folder = trackers.folder if trackers is not None else None
    with without_collecting():
        return create_accelerator(
            options.mixed_precision,
            usable_trackers(trackers) or None,
            None if folder is None else str(folder),
            some_unused=options.trains_text_encoders or bool(options.network_args),
            options=options,
        )


def load_base(options: Options, accelerator: Processes) -> LiveBase:
    """The base on the device."""
    with without_collecting():
        pipeline = load_pipeline(
            options.pretrained_model_name_or_path, Precision.of(options).loaded, options.vae
        )
    return build_live_base(options, pipeline, accelerator.device, accelerator.autocast)


def start_chain(plan: RunPlan, room: Classroom) -> RunPlan:
    """The plan of a run that begins with its file as the parent; others stay as they are."""
    if room.weights is None or plan.parent.source is not None:
        return plan
    first = plan.tasks[0]
    spec = room.spec(first, plan.configs[first.name].options)
    trained = going_on(room.weights, spec)
    return replace(plan, parent=parent_of(plan.options, room.weights, trained))


def take_place(run: Context) -> None:
    """Begins the run's folder and puts the parent's delta on the model.

    Raises:
        LineageError: the parent does not fit the base.  DiskError: what will come has no room.
    """
    parent = run.plan.parent
    run.base.adapted.check_fits(parent.carry.total)
    check_biases(run.base.adapted.layers, parent.carry.biases)
    if run.base.schedule.prediction_type == "v_prediction" and not run.options.v_parameterization:
        run.logbook.say("the base predicts v (its own files say so): v_parameterization is on.")
    if run.is_main:
        wanted = estimate_disk(run.plan, run.room)
        require_free_space(run.store.output_dir, wanted, f"run '{run.name}'")
        if parent.source is not None:
            run.store.save_parent(parent)
        run.logbook.write(status="running")
    run.accelerator.wait_for_everyone()
    run.base.show(parent.carry.change)


def estimate_disk(plan: RunPlan, room: Classroom) -> int:
    """Bytes that a run writes at most: adapters, a dense carry, its deliverable, a state."""
    adapter = dense = 0
    options, adapted = plan.configs[plan.tasks[0].name].options, room.base.adapted
    for name, target in select_modules(adapted, options, room.weights).items():
        out, inputs = layer_shape(adapted.layers[name])
        adapter += 4 * target.rank * (out + inputs)
        dense += 4 * out * inputs
    carry = min(dense, adapter * len(plan.tasks)) + plan.parent.carry.total.nbytes()
    return adapter * (len(plan.tasks) + 3) + 3 * carry
