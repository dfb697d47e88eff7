"""Images at a time as the memory allows: a batch is halved when it does not fit, a single image
goes through the VAE in tiles.

What has fitted is remembered, so that a batch too large is tried once in a process: the same work
is cut alike from its beginning, and the same cut gives the same pixels. Tiles overlap by a quarter
and are blended (diffusers' own); their size is set here, because SDXL's VAE would take 1024 pixels
for one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lcp_plugin.sdxl.devices import free_memory, is_out_of_memory

SMALLEST_TILE = 16  # latents along a side
_fitted: dict[Hashable, int] = {}  # kind of work -> how many have fitted at a time


def in_batches(kind: Hashable, count: int, work: Callable[[int, int], Tensor]) -> list[Tensor]:
    """work(start, stop) over `count` images, as many at a time as fit.

    Raises:
        torch.OutOfMemoryError: a single one does not fit.
    """
    size, start = min(_fitted.get(kind, count), count), 0
    results: list[Tensor] = []
    while start < count:
        stop = min(start + size, count)
        result = _try(work, start, stop, must=stop - start == 1)
        if result is None:
            size = _fitted[kind] = (stop - start + 1) // 2
            continue
        results.append(result)
        start = stop
    return results


def _try(work: Callable[[int, int], Tensor], start: int, stop: int, must: bool) -> Tensor | None:
    """The result, or None where memory ran out and less may be tried."""
    try:
        return work(start, stop)
    except RuntimeError as error:
        if must or not is_out_of_memory(error):
            raise
    free_memory()  # here the failed work's tensors are gone
    return None


def whole_or_tiled(vae: Any, kind: Hashable, part: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What `run` makes of pixels (n, 3, H, W) or latents (n, c, h, w) with the VAE.

    A single image that does not fit whole goes in tiles of half its side, then of a quarter.
    """
    count = len(part)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = max(part.shape[2:]) // (factor if part.shape[1] == 3 else 1)  # in latents
    tile = _fitted.get(("tile", kind), side)
    while True:
        last = count > 1 or tile // 2 < min(SMALLEST_TILE, side)
        with _tiled(vae, tile if tile < side else None, factor):
            result = _try(lambda start, stop: run(), 0, count, must=last)
        if result is not None:
            return result
        tile //= 2
        _fitted[("tile", kind)] = tile


@contextmanager
def _tiled(vae: Any, tile: int | None, factor: int) -> Iterator[None]:
    """The VAE with tiles of so many latents a side; untouched for None."""
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(vae, name) for name in names}
    if tile is not None:
        vae.use_tiling = True
        vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * factor
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
