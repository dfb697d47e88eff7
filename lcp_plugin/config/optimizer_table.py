"""The optimizers that optimizer_type names: one row each, for the config's check and for training.

A new optimizer is one row here. Names are kohya's, and torch.optim's own; capitals do not count.
Any other optimizer is given as package.module.Class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NESTEROV = MappingProxyType({"nesterov": True, "momentum": 0.9})  # as kohya has it
_ALWAYS_HERE = ("torch", "transformers", "bitsandbytes")  # or, as the last, with a substitute
_FINDS_ITS_RATE = ("dadapt", "prodigy")  # beginnings of names and of packages


@dataclass(frozen=True)
class KnownOptimizer:
    """An optimizer by name."""

    name: str  # as it is written in documentation
    path: str  # package.module.Class
    substitute: str = ""  # the same algorithm in torch, where bitsandbytes' own cannot run
    arguments: Mapping[str, Any] = field(default_factory=dict)  # beside those of optimizer_args

    @property
    def package(self) -> str:
        """The package to install for it; "" where it is always here."""
        package = self.path.partition(".")[0]
        return "" if package in _ALWAYS_HERE else package

    @property
    def label(self) -> str:
        """The name of its class."""
        return self.path.rpartition(".")[2]

    @property
    def in_bitsandbytes(self) -> bool:
        """Whether it is one of bitsandbytes' own."""
        return self.path.startswith("bitsandbytes.")


def _bitsandbytes(
    name: str, label: str = "", substitute: str = "", **arguments: Any
) -> KnownOptimizer:
    path = f"bitsandbytes.optim.{label or name}"
    return KnownOptimizer(name, path, substitute and f"torch.optim.{substitute}", arguments)


_TORCH = ("AdamW", "Adam", "SGD", "Adadelta", "Adagrad", "Adamax", "ASGD", "LBFGS", "Muon")
_MORE_TORCH = ("NAdam", "RAdam", "RMSprop", "Rprop")

KNOWN: tuple[KnownOptimizer, ...] = (
    *(KnownOptimizer(name, f"torch.optim.{name}") for name in (*_TORCH, *_MORE_TORCH)),
    KnownOptimizer("SGDNesterov", "torch.optim.SGD", arguments=_NESTEROV),
    KnownOptimizer("Adafactor", "transformers.optimization.Adafactor"),
    _bitsandbytes("AdamW8bit", substitute="AdamW"),
    _bitsandbytes("PagedAdamW", substitute="AdamW"),
    _bitsandbytes("PagedAdamW8bit", substitute="AdamW"),
    _bitsandbytes("PagedAdamW32bit", substitute="AdamW"),
    _bitsandbytes("Lion"),
    _bitsandbytes("Lion8bit"),
    _bitsandbytes("PagedLion8bit"),
    _bitsandbytes("SGDNesterov8bit", "SGD8bit", substitute="SGD", **_NESTEROV),
    _bitsandbytes("AdEMAMix8bit"),
    _bitsandbytes("PagedAdEMAMix8bit"),
    KnownOptimizer("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint"),
    KnownOptimizer("DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint"),
    KnownOptimizer("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad"),
    KnownOptimizer("DAdaptAdam", "dadaptation.DAdaptAdam"),
    KnownOptimizer("DAdaptAdan", "dadaptation.DAdaptAdan"),
    KnownOptimizer("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP"),
    KnownOptimizer("DAdaptLion", "dadaptation.DAdaptLion"),
    KnownOptimizer("DAdaptSGD", "dadaptation.DAdaptSGD"),
    KnownOptimizer("Prodigy", "prodigyopt.Prodigy"),
    KnownOptimizer("AdamWScheduleFree", "schedulefree.AdamWScheduleFree"),
    KnownOptimizer("RAdamScheduleFree", "schedulefree.RAdamScheduleFree"),
    KnownOptimizer("SGDScheduleFree", "schedulefree.SGDScheduleFree"),
)
_BY_NAME = MappingProxyType({known.name.lower(): known for known in KNOWN})
OPTIMIZER_NAMES = tuple(known.name for known in KNOWN)


def find_optimizer(name: str) -> KnownOptimizer | None:
    """The row of a name, AdamW's of none; None for others, dotted paths among them."""
    return _BY_NAME.get(name.lower() or "adamw")


def name_of_class(path: str) -> str:
    """The name of an optimizer that a header gives as module.Class: the path itself for one that
    is not of the packages here, as optimizer_type takes it.
    """
    package, label = path.partition(".")[0], path.rpartition(".")[2]
    known = _BY_NAME.get(label.lower())
    is_known = known is not None and known.path.partition(".")[0] == package
    return label if is_known else path


def finds_its_rate(name: str) -> bool:
    """Whether an optimizer, by name or by path, finds one learning rate for all parts itself."""
    return name.lower().startswith(_FINDS_ITS_RATE)
