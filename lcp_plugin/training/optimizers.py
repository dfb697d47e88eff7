"""Optimizers by kohya's names, and their state as tensors and JSON.

bitsandbytes' 8-bit and paged optimizers run on CUDA and, from 0.45 on, on the CPU. Where one cannot
run, the same
algorithm unquantised takes its place with one warning; the optimizer really used is recorded. Plain
AdamW and Adam use
torch's fused kernels.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lcp_plugin.config.network_args import parse_network_args
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.sdxl.precision import set_mode
from lcp_plugin.training.optimizer_args import check_arguments, misfit, parse_arguments

log = logging.getLogger(__name__)

BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "pagedadamw": "PagedAdamW",
    "pagedadamw8bit": "PagedAdamW8bit",
    "pagedadamw32bit": "PagedAdamW32bit",
    "lion": "Lion",
    "lion8bit": "Lion8bit",
    "pagedlion8bit": "PagedLion8bit",
    "sgdnesterov8bit": "SGD8bit",
    "ademamix8bit": "AdEMAMix8bit",
    "pagedademamix8bit": "PagedAdEMAMix8bit",
}
UNQUANTISED = {
    "adamw8bit": "torch.optim.AdamW",
    "pagedadamw": "torch.optim.AdamW",
    "pagedadamw8bit": "torch.optim.AdamW",
    "pagedadamw32bit": "torch.optim.AdamW",
    "sgdnesterov8bit": "torch.optim.SGD",
}
PACKAGES = {  # kohya's names of optimizers in packages of their own
    "dadaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadam": "dadaptation.DAdaptAdam",
    "dadaptadagrad": "dadaptation.DAdaptAdaGrad",
    "dadaptadan": "dadaptation.DAdaptAdan",
    "dadaptadanip": "dadaptation.experimental.DAdaptAdanIP",
    "dadaptlion": "dadaptation.DAdaptLion",
    "dadaptsgd": "dadaptation.DAdaptSGD",
    "prodigy": "prodigyopt.Prodigy",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
    "adafactor": "transformers.optimization.Adafactor",
}
FUSED = ("AdamW", "Adam")
NOT_PAGED = "Paged optimizers are not supported on CPU"  # they run there, unpaged


def create_optimizer(
    name: str, args: Sequence[str], groups: Sequence[dict[str, Any]], learning_rate: float
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over parameter groups {"params", "lr", ...}, and the name of what is really
    used.

    Args:
        name: kohya's optimizer_type, any torch.optim name, or a dotted path; "" is AdamW.
    Raises:
        ConfigError: unknown name, package not installed, arguments that do not fit.
    """
    values = parse_arguments(args)
    wanted = (name or "AdamW").lower()
    if wanted in BITSANDBYTES:
        return _create_bitsandbytes(wanted, values, groups, learning_rate)
    values = _with_nesterov(wanted, values)
    path = PACKAGES.get(wanted) or _torch_path(name or "AdamW")
    if path.startswith(("dadaptation.", "prodigyopt.")):
        _check_one_rate(name, groups)
    return _build(name or "AdamW", path, values, groups, learning_rate)


def check_optimizer(options: Options) -> None:
    """Raises ConfigError for what the optimizer refuses, seen on a scratch parameter.

    Steps are tried of torch's and the known packages' alone: others may need the run's device.
    """
    name, rate = options.optimizer_type or "AdamW", options.learning_rate
    scratch = nn.Parameter(torch.zeros(8, 8))
    groups = [{"params": [scratch], "lr": rate}]
    if name.lower() in BITSANDBYTES:
        _check_bitsandbytes(name.lower(), parse_arguments(options.optimizer_args), groups, rate)
        return
    optimizer, used = create_optimizer(name, options.optimizer_args, groups, rate)
    path = used.partition("(")[0]
    if not path.startswith("torch.optim.") and path not in PACKAGES.values():
        return
    scratch.grad = torch.ones_like(scratch)
    try:
        set_mode(optimizer, "train")
        optimizer.step()
    except Exception as error:  # values that are looked at only here
        raise misfit(path, name, error) from error


def joins_exactly(options: Options) -> bool:
    """Whether neighbouring factors may be one parameter: bitsandbytes' optimizers work entry by
    entry and keep 8-bit states in blocks of 256, but measure whole tensors where they clip.
    """
    given = parse_arguments(options.optimizer_args)
    whole = {"percentile_clipping", "max_unorm", "block_wise"} & set(given)
    drops = parse_network_args(options.network_args).module_dropout  # leaves factors out of a step
    views = options.ddp_gradient_as_bucket_view
    return options.optimizer_type.lower() in BITSANDBYTES and not (whole or drops or views)


def _check_one_rate(name: str, groups: Sequence[dict[str, Any]]) -> None:
    """Optimizers that find their rate find one for all groups."""
    rates = sorted({float(group["lr"]) for group in groups if group.get("lr")})
    if len(rates) > 1:
        raise ConfigError(
            f"optimizer_type = '{name}' takes one rate for all, got "
            f"{' and '.join(map(str, rates))}; leave out rates of parts and blocks, and LoRA+."
        )


def _torch_path(name: str) -> str:
    if "." in name:
        return name
    if name.lower() == "sgdnesterov":
        return "torch.optim.SGD"
    known = {n.lower(): n for n in vars(torch.optim) if isinstance(vars(torch.optim)[n], type)}
    if name.lower() in known:
        return f"torch.optim.{known[name.lower()]}"
    names = [*known.values(), *BITSANDBYTES.values(), *PACKAGES]
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1)
    spelled = {n.lower(): n for n in names}
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
    wanted: str,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
) -> tuple[torch.optim.Optimizer, str]:
    label, values = BITSANDBYTES[wanted], _with_nesterov(wanted, values)
    try:
        cls = _bitsandbytes_class(label)
        _try_step(cls, label, values, groups)
    except ConfigError:
        raise
    except Exception as error:
        path, reason = _unquantised(wanted, error)
        log.warning("bitsandbytes is unusable here (%s): %s instead of %s.", reason, path, label)
        return _build(label, path, values, groups, learning_rate)
    # bitsandbytes says so again at the first real step
    warnings.filterwarnings("ignore", message=NOT_PAGED)
    optimizer = cls(list(groups), lr=learning_rate, **values)
    return optimizer, f"bitsandbytes.optim.{label}({_write_arguments(values)})"


def _check_bitsandbytes(
    wanted: str,
    values: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    learning_rate: float,
) -> None:
    """As `_create_bitsandbytes` does, but for the step and the warning."""
    label, values = BITSANDBYTES[wanted], _with_nesterov(wanted, values)
    try:
        cls = _bitsandbytes_class(label)
    except Exception as error:
        _build(label, _unquantised(wanted, error)[0], values, groups, learning_rate)
        return
    _construct(cls, f"bitsandbytes.optim.{label}", label, values, groups, learning_rate)


def _with_nesterov(wanted: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"nesterov": True, "momentum": 0.9, **values} if "nesterov" in wanted else values


def _unquantised(wanted: str, error: Exception) -> tuple[str, str]:
    """The same algorithm in torch, and why it takes the place of bitsandbytes' own."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if wanted in UNQUANTISED:
        return UNQUANTISED[wanted], reason
    raise ConfigError(
        f"optimizer_type = '{BITSANDBYTES[wanted]}' needs bitsandbytes, which is unusable here "
        f"({reason}); use AdamW or Adafactor."
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
