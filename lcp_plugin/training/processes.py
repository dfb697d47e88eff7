"""One or several processes: rank 0 decides and writes, the others receive the same values.

Values are sent tensor by tensor; only names and shapes go as objects, in memory, never to disk.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcp_plugin.config.options import Options
from lcp_plugin.delta import (
    adapter_from_tensors,
    adapter_to_tensors,
    delta_from_tensors,
    delta_to_tensors,
)
from lcp_plugin.errors import FinishedError, LcpError
from lcp_plugin.hooks import Carry, TaskStart
from lcp_plugin.store.carries import carry_from_tensors, carry_to_tensors


class Processes(Protocol):
    """What we ask of accelerate's Accelerator: one process among several, its device, its logs."""

    num_processes: int
    process_index: int
    is_main_process: bool
    device: torch.device
    scaler: Any  # torch's GradScaler, or None
    ddp_handler: Any  # accelerate's DistributedDataParallelKwargs, or None
    trackers: list[Any]

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Both as they take part in several processes."""

    def autocast(self) -> AbstractContextManager[None]:
        """The run's mixed precision."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Gradients stay each process's own inside."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, scaled where fp16 needs it."""

    def unscale_gradients(self, optimizer: Any) -> None:
        """Takes the scale off again."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """The mean or sum over all processes."""

    def wait_for_everyone(self) -> None:
        """All processes meet here."""

    def free_memory(self) -> Any:
        """Forgets what was prepared."""

    def init_trackers(
        self, name: str, config: dict[str, Any] | None, init_kwargs: dict[str, Any]
    ) -> None:
        """Starts the trackers."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers for the trackers."""

    def end_training(self) -> None:
        """Ends the trackers."""


def create_accelerator(
    mixed_precision: str,
    log_with: Sequence[str] | None = None,
    logging_dir: str | None = None,
    some_unused: bool = False,
    options: Options | None = None,
) -> Processes:
    """accelerate's Accelerator; accumulation is ours, so that draws stay derived from indices.

    `some_unused`: parameters without a gradient exist (SDXL skips text encoder 1's last layer).
    `options`: those that start with ddp_ are looked at.
    """
    from accelerate import Accelerator

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    no_device = not torch.accelerator.is_available()
    accelerator: Processes = Accelerator(
        cpu=several and no_device,  # else it would silently start as many single processes
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_dir=logging_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=describe_processes(options or Options(), some_unused),
    )
    return accelerator


def describe_processes(options: Options, some_unused: bool = False) -> list[Any]:
    """How processes share gradients and wait for each other, in accelerate's terms."""
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            find_unused_parameters=some_unused,
            gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
            static_graph=options.ddp_static_graph,
        )
    ]
    if options.ddp_timeout is not None:
        wait = timedelta(minutes=options.ddp_timeout)
        handlers.append(InitProcessGroupKwargs(timeout=wait))
    return handlers


def end_processes(failed: bool = False) -> None:
    """End the process group: a thread of it that outlives the interpreter aborts the process.

    After a failure a peer may still wait inside a collective, and NCCL would wait for it: there
    the launcher ends the processes.
    """
    group = torch.distributed
    if not group.is_available() or not group.is_initialized():
        return
    gc.collect()  # models that share gradients hold the group in circles
    if not failed or group.get_backend() == "gloo":
        group.destroy_process_group()


def meets_always(accelerator: Processes) -> bool:
    """Whether processes must share gradients after every micro-batch: torch's static graph learns
    what is shared from the very first one. (The sum over a step is the same.)
    """
    handler = accelerator.ddp_handler
    return handler is not None and bool(handler.static_graph)


def share_tensors(
    accelerator: Processes, tensors: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of rank 0 on every rank, on the CPU."""
    if accelerator.num_processes == 1:
        return dict(tensors or {})
    from accelerate.utils import broadcast_object_list

    shapes: list[Any] = [None]
    if accelerator.is_main_process:
        assert tensors is not None
        shapes = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}]
    broadcast_object_list(shapes, from_process=0)
    shared: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes[0].items():
        tensor = (
            tensors[name].to(accelerator.device)
            if accelerator.is_main_process and tensors is not None
            else torch.empty(shape, dtype=dtype, device=accelerator.device)
        )
        torch.distributed.broadcast(tensor, src=0)
        shared[name] = tensor.cpu()
    return shared


def share_start(accelerator: Processes, make: Callable[[], TaskStart]) -> TaskStart:
    """`make()` on rank 0, its value on all ranks; an error of rank 0 is raised on all."""
    if accelerator.num_processes == 1:
        return make()
    start, failure = _attempt(accelerator, make)
    _share_failure(accelerator, failure)
    tensors = None
    if start is not None:
        tensors = {
            **delta_to_tensors(start.base, "base/"),
            **adapter_to_tensors(start.adapter, "adapter/"),
        }
    shared = share_tensors(accelerator, tensors)
    trainable = share_object(accelerator, None if start is None else sorted(start.trainable))
    return TaskStart(
        delta_from_tensors(shared, "base/"),
        adapter_from_tensors(shared, "adapter/"),
        frozenset(trainable),
    )


def share_carry(accelerator: Processes, make: Callable[[], Carry]) -> Carry:
    """`make()` on rank 0, its value on all ranks; an error of rank 0 is raised on all."""
    if accelerator.num_processes == 1:
        return make()
    carry, failure = _attempt(accelerator, make)
    _share_failure(accelerator, failure)
    shared = share_tensors(accelerator, None if carry is None else carry_to_tensors(carry))
    records = share_object(accelerator, None if carry is None else carry.tasks)
    return carry_from_tensors(shared, records)


def share_state(accelerator: Processes, read: Callable[[], Any]) -> Any:
    """(step, parts, facts) of `RunStore.read_state` on every rank; None where there is no state."""
    if accelerator.num_processes == 1:
        return read()
    found, failure = _attempt(accelerator, read)
    _share_failure(accelerator, failure)
    step, parts, facts = found if found is not None else (None, {}, None)
    flat = {f"{part}|{key}": t for part, tensors in parts.items() for key, t in tensors.items()}
    shared = share_tensors(accelerator, flat if accelerator.is_main_process else None)
    step, facts = share_object(accelerator, (step, facts))
    if step is None:
        return None
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shared.items():
        part, _, key = name.partition("|")
        grouped.setdefault(part, {})[key] = tensor
    return step, grouped, facts


def share_decision(accelerator: Processes, decide: Callable[[], Any]) -> Any:
    """A small value that rank 0 works out, on every rank; its error is raised on all."""
    value, failure = _attempt(accelerator, decide)
    _share_failure(accelerator, failure)
    return share_object(accelerator, value)


def share_object(accelerator: Processes, value: Any) -> Any:
    """A small value of rank 0 on every rank."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def _attempt(accelerator: Processes, make: Callable[[], Any]) -> tuple[Any, LcpError | None]:
    if not accelerator.is_main_process:
        return None, None
    try:
        return make(), None
    except LcpError as error:
        return None, error


def _share_failure(accelerator: Processes, failure: LcpError | None) -> None:
    message = share_object(accelerator, None if failure is None else str(failure))
    finished = share_object(accelerator, isinstance(failure, FinishedError))
    if message is not None:
        raise failure or (FinishedError(message) if finished else LcpError(message))
