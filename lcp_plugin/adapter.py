"""An adapter: LoRA factors per module, with the alpha and rank that they were trained with.

Module names are diffusers' own under the prefixes `unet.`, `text_encoder.` and `text_encoder_2.`:
`unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q` is one. A convolution is flattened
to (out, in*k*k); `kernel` remembers how to fold it back. Values are fp32 on the CPU, and stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.lora import compute_update, draw_down, orthogonal_columns
from lcp_plugin.seeds import derive_seed

Kernel = tuple[int, int]


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; one pass without a mask (aminmax propagates NaN)."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _frozen(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


@dataclass(frozen=True)
class Factors:
    """One module's LoRA: D = (alpha / rank) B A."""

    down: Tensor  # A (rank, in), fp32
    up: Tensor  # B (out, rank), fp32
    alpha: float
    kernel: Kernel | None = None  # of a convolution; None for a linear layer

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.down.shape[0] != self.up.shape[1]:
            raise FileFormatError(
                f"LoRA factors of shapes {tuple(self.up.shape)} and {tuple(self.down.shape)} do "
                f"not multiply; "
                "wanted (out, rank) and (rank, in)."
            )
        object.__setattr__(self, "down", _frozen(self.down))
        object.__setattr__(self, "up", _frozen(self.up))
        object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.up.shape[0], self.down.shape[1]

    def update(self) -> Tensor:
        """scale * B A   # (out, in), fp32."""
        return compute_update(self.up, self.down, self.scale)


class Adapter(Mapping[str, Factors]):
    """Module name -> Factors; a read-only mapping in sorted order."""

    def __init__(self, factors: Mapping[str, Factors] | None = None) -> None:
        self._factors = MappingProxyType(dict(sorted((factors or {}).items())))

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def restrict(self, names: Iterable[str]) -> Adapter:
        """Only the modules in `names`."""
        wanted = set(names)
        return Adapter({name: f for name, f in self.items() if name in wanted})

    def without(self, names: Iterable[str]) -> Adapter:
        """All modules but those in `names`."""
        unwanted = set(names)
        return Adapter({name: f for name, f in self.items() if name not in unwanted})

    def map_down(self, function: Callable[[str, Tensor], Tensor]) -> Adapter:
        """A copy whose A's are `function(name, A)`."""
        return Adapter(
            {n: Factors(function(n, f.down), f.up, f.alpha, f.kernel) for n, f in self.items()}
        )

    def check_finite(self) -> None:
        """Raises NumericError naming the first module that holds NaN or infinity."""
        for name, factors in self.items():
            if not (is_finite(factors.up) and is_finite(factors.down)):
                raise NumericError(
                    f"the adapter of {name} holds NaN or infinity; it is not used or saved."
                )


@dataclass(frozen=True)
class AdapterSpec:
    """What a fresh adapter of this task looks like, and where its random numbers come from.

    `rank` and `alpha` hold for all modules that `ranks` and `alphas` do not name. Each module draws
    from a generator of its own, derived from (seed, name), so that begin_task may be repeated and
    the set of modules does not matter.
    """

    shapes: Mapping[str, tuple[int, int]]  # module -> (out, in), convolutions flattened
    rank: int
    alpha: float
    seed: int  # already derived from (run seed, task index)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """The rank of a module, as asked: never clipped to its shape."""
        return self.ranks.get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of a module."""
        return float(self.alphas.get(name, self.alpha))

    def generator(self, name: str, purpose: str = "start") -> torch.Generator:
        """A CPU generator that always starts alike for (seed, purpose, name)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, purpose, name))

    def fresh(self, init: str = "gaussian") -> Adapter:
        """B = 0 and a random A (`lora.draw_down`): the adapter of a first task."""
        return self.with_down(
            {
                name: draw_down((self.rank_of(name), shape[1]), init, self.generator(name))
                for name, shape in self.shapes.items()
            }
        )

    def gaussian(self) -> Adapter:
        """`fresh("gaussian")`, as peft and the authors' code: A ~ N(0, (1/rank)^2), B = 0."""
        return self.fresh("gaussian")

    def with_down(self, downs: Mapping[str, Tensor]) -> Adapter:
        """B = 0 and the given A's, one for each module of the spec."""
        return Adapter(
            {
                name: Factors(
                    down=downs[name],
                    up=torch.zeros(out, downs[name].shape[0]),
                    alpha=self.alpha_of(name),
                    kernel=self.kernels.get(name),
                )
                for name, (out, _) in self.shapes.items()
            }
        )

    def orthogonal_to(self, previous: Mapping[str, Tensor]) -> Adapter:
        """B = 0, and A's columns orthogonal to those of `previous` (module -> (rank, in))."""
        return self.with_down({name: orthogonal_columns(previous[name]) for name in self.shapes})
