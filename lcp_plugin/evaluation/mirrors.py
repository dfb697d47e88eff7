"""Reference pictures as the model could show them: through its autoencoder, at the size it draws.

An encoder sees size and sharpness too: among photographs as their files are, most images of 48
pixels lay nearest to those of one subject, whatever was in them. What a model draws is therefore
told apart among references that went the way of its own images. Kept as pictures, made once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.evaluation.images import Preprocessing, hash_image, preprocess
from lcp_plugin.evaluation.pictures import Picture, Studio, is_made
from lcp_plugin.formats.disk import remove_temporary_files
from lcp_plugin.formats.pictures import open_rgb, save_picture
from lcp_plugin.sdxl.live_base import LiveBase


def encode_files(base: LiveBase, files: Sequence[Path], side: int | None = None) -> Tensor:
    """Scaled latents of centre-cropped images of `side` pixels, by default the base's own.

    Returns:
        (n, c, h, w), fp32 on the CPU.
    """
    side = side or base.native_side
    how = Preprocessing(side, side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    pixels = torch.stack([preprocess(open_rgb(file), how) for file in files])
    return base.encode_images(pixels).cpu()


@torch.no_grad()
def mirror_files(studio: Studio, folder: Path, files: Sequence[Path]) -> list[Path]:
    """The files as the studio's base returns them, in `folder`; the base is loaded if any lacks.

    One at a time, so that none depends on what else is there.
    """
    remove_temporary_files(folder)
    found = []
    for file in files:
        digest = hash_image(open_rgb(file))
        place = folder / f"{digest[:16]}.png"
        told = {"reference": digest, "size": studio.sampling.size, "vae": studio.vae}
        facts = {"mirror": json.dumps(told, sort_keys=True)}
        if not is_made(Picture(place, "", 0), facts):
            latents = encode_files(studio.live, [file], studio.sampling.size)
            save_picture(place, studio.live.decode(latents)[0], facts)
        found.append(place)
    return found
