"""Optimizers by kohya's names (config/optimizer_table has them), torch's, or a path.

bitsandbytes' 8-bit and paged optimizers run on CUDA and, from 0.45 on, on the CPU. Where one cannot
run, the same algorithm unquantised takes its place with one warning; the optimizer really used is
recorded. Plain AdamW and Adam use torch's fused kernels.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lcp_plugin.config.optimizer_table import (
    KNOWN,
    OPTIMIZER_NAMES,
    KnownOptimizer,
    find_optimizer,
    finds_its_rate,
)
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.disk import first_line
from lcp_plugin.training.optimizer_args import check_arguments, misfit, parse_arguments

log = logging.getLogger(__name__)

FUSED = ("AdamW", "Adam")
NOT_PAGED = "Paged optimizers are not supported on CPU"  # they run there, unpaged


@dataclass(frozen=True)
class OptimizerChoice:
    """The optimizer that a task's factors are trained with."""

    name: str = "AdamW"  # kohya's optimizer_type, a torch.optim name, or package.module.Class
    arguments: tuple[str, ...] = ()  # key=value
    rate: float = 2e-6  # of groups that have none of their own
    parts_vary: bool = False  # a step may leave factors out, or see their gradients in one buffer

    @classmethod
    def of(cls, options: Options) -> OptimizerChoice:
        """What the options ask for."""
        return cls(
            name=options.optimizer_type or "AdamW",
            arguments=options.optimizer_args,
            rate=options.learning_rate,
            parts_vary=bool(options.network.module_dropout or options.ddp_gradient_as_bucket_view),
        )

    @property
    def joins_exactly(self) -> bool:
        """Whether neighbouring factors may be one parameter: bitsandbytes' optimizers work entry
        by entry and keep 8-bit states in blocks of 256, but measure whole tensors where they clip.
        """
        known = find_optimizer(self.name)
        whole = {"percentile_clipping", "max_unorm", "block_wise"}
        measures = whole & set(parse_arguments(self.arguments))
        return known is not None and known.in_bitsandbytes and not (measures or self.parts_vary)


def create_optimizer(
    choice: OptimizerChoice, groups: Sequence[dict[str, Any]]
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over parameter groups {"params", "lr", ...}, and what is really used.

    Raises:
        ConfigError: unknown name, package not installed, arguments that do not fit.
    """
    known, values = find_optimizer(choice.name), parse_arguments(choice.arguments)
    if known is None:
        path = _checked_path(choice.name)
    else:
        path, values = known.path, {**known.arguments, **values}
    if known is not None and known.in_bitsandbytes:
        return _create_bitsandbytes(known, values, groups, choice.rate)
    if finds_its_rate(path):
        _check_one_rate(choice.name, groups)
    return _build(choice.name, path, values, groups, choice.rate)


def check_optimizer(choice: OptimizerChoice) -> None:
    """Raises ConfigError for what the optimizer refuses, seen on a scratch parameter.

    Steps are tried of torch's and the known packages' alone: others may need the run's device.
    """
    scratch = nn.Parameter(torch.zeros(8, 8))
    groups = [{"params": [scratch], "lr": choice.rate}]
    known = find_optimizer(choice.name)
    if known is not None and known.in_bitsandbytes:
        values = {**known.arguments, **parse_arguments(choice.arguments)}
        _check_bitsandbytes(known, values, groups, choice.rate)
        return
    optimizer, used = create_optimizer(choice, groups)
    path = used.partition("(")[0]
    if not path.startswith("torch.optim.") and path not in {row.path for row in KNOWN}:
        return
    scratch.grad = torch.ones_like(scratch)
    try:
        set_mode(optimizer, "train")
        optimizer.step()
    except Exception as error:  # values that are looked at only here
        raise misfit(path, choice.name, error) from error


def _check_one_rate(name: str, groups: Sequence[dict[str, Any]]) -> None:
    """Optimizers that find their rate find one for all groups."""
    rates = sorted({float(group["lr"]) for group in groups if group.get("lr")})
    if len(rates) > 1:
        raise ConfigError(
            f"optimizer_type = '{name}' takes one rate for all, got "
            f"{' and '.join(map(str, rates))}; leave out rates of parts and blocks, and LoRA+."
        )


def _checked_path(name: str) -> str:
    """A dotted path. Raises ConfigError for a plain name that is no known optimizer's."""
    if "." in name:
        return name
    spelled = {known.lower(): known for known in OPTIMIZER_NAMES}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f"did you mean '{spelled[near[0]]}'?" if near else "give a torch.optim name or pkg.Class"
    raise ConfigError(f"optimizer_type = '{name}' is not known; {hint}")


def _load_class(path: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    module, _, attribute = path.rpartition(".")
    try:
        found: Callable[..., torch.optim.Optimizer] = getattr(
            importlib.import_module(module), attribute
        )
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"optimizer_type = '{name}' needs the package {package} ({error}); "
            f"pip install {package}, or use AdamW8bit."
        ) from error
    except AttributeError:
        raise ConfigError(f"optimizer_type = '{name}': {module} has no '{attribute}'.") from None
    return found


def _build(
    name: str,
    path: str,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
) -> tuple[torch.optim.Optimizer, str]:
    cls, values = _load_class(path, name), dict(values)
    if path == "torch.optim.SGD" and "nesterov" not in values and "momentum" not in values:
        values |= {"nesterov": True, "momentum": 0.9}
    if path.startswith("torch.optim.") and path.rpartition(".")[2] in FUSED:
        values.setdefault("fused", True)
    rate: float | None = learning_rate
    if path.endswith(".Adafactor") and values.get("relative_step", True):
        groups, rate = [{k: v for k, v in g.items() if k != "lr"} for g in groups], None
    optimizer = _construct(cls, path, name, values, groups, rate)
    return optimizer, f"{path}({_write_arguments(values)})"


def _construct(
    cls: Callable[..., torch.optim.Optimizer],
    path: str,
    name: str,
    values: dict[str, Any],
    params: Sequence[Any],
    rate: float | None,
) -> torch.optim.Optimizer:
    check_arguments(cls, path, name, values)
    try:
        return cls(list(params), lr=rate, **values)
    except Exception as error:  # whatever an optimizer says to arguments it does not like
        raise misfit(path, name, error) from error


def _write_arguments(values: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


def _create_bitsandbytes(
    known: KnownOptimizer,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
) -> tuple[torch.optim.Optimizer, str]:
    label = known.label
    try:
        cls = _bitsandbytes_class(label)
        _try_step(cls, label, values, groups)
    except ConfigError:
        raise
    except Exception as error:
        path, reason = _unquantised(known, error)
        log.warning("bitsandbytes is unusable here (%s): %s instead of %s.", reason, path, label)
        return _build(label, path, values, groups, learning_rate)
    # bitsandbytes says so again at the first real step
    warnings.filterwarnings("ignore", message=NOT_PAGED)
    optimizer = cls(list(groups), lr=learning_rate, **values)
    return optimizer, f"{known.path}({_write_arguments(values)})"


def _check_bitsandbytes(
    known: KnownOptimizer,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
) -> None:
    """Builds what `_create_bitsandbytes` would, without its step and its warning."""
    label = known.label
    try:
        cls = _bitsandbytes_class(label)
    except Exception as error:
        _build(label, _unquantised(known, error)[0], values, groups, learning_rate)
        return
    _construct(cls, known.path, label, values, groups, learning_rate)


def _unquantised(known: KnownOptimizer, error: Exception) -> tuple[str, str]:
    """The same algorithm in torch, and why it takes the place of bitsandbytes' own."""
    reason = first_line(error, 300)
    if known.substitute:
        return known.substitute, reason
    raise ConfigError(
        f"optimizer_type = '{known.label}' needs bitsandbytes, which is unusable "
        f"here ({reason}); use AdamW or Adafactor."
    ) from error


def _bitsandbytes_class(label: str) -> Callable[..., torch.optim.Optimizer]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    found: Callable[..., torch.optim.Optimizer] = getattr(bitsandbytes.optim, label)
    return found


def _try_step(
    cls: Callable[..., torch.optim.Optimizer],
    label: str,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
) -> None:
    """One step on a scratch parameter: whether the library's kernels run on this device at all."""
    device = next(p.device for group in groups for p in group["params"])
    scratch = nn.Parameter(torch.zeros(64, 128, device=device))  # big enough to be quantised
    scratch.grad = torch.zeros_like(scratch)
    path = f"bitsandbytes.optim.{label}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOT_PAGED)
        optimizer = _construct(cls, path, label, values, [scratch], 1e-3)
        try:
            optimizer.step()
        except TypeError as error:
            raise misfit(path, label, error) from error


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer keeps two sets of weights (schedule-free ones), one of them shown."""
    return callable(getattr(getattr(optimizer, "optimizer", optimizer), "eval", None))


def set_mode(optimizer: Any, mode: str) -> None:
    """Shows the weights of train or eval, if an optimizer has two sets (`has_modes`)."""
    if has_modes(optimizer):
        getattr(getattr(optimizer, "optimizer", optimizer), mode)()
