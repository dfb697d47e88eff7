"""The fixed mean that centres `effnet`'s features, and how it came about.

Mean of EfficientNet-Lite0's pooled features over 512 renders of shape scenes of the embedded base's
world (`tiny.world`, generator seed 2410; 48 px, upsampled to 224). They are drawn by this project's
own code and show none of the tasks. `python -m tiny_base.effnet_mean` prints and writes it again.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcp_plugin.evaluation.images import stack_images
from lcp_plugin.evaluation.metrics import EFFNET_MEAN, EffnetEncoder
from lcp_plugin.formats.tensors import write_tensors

COUNT, SEED = 512, 2410


def draw_world(count: int = COUNT, seed: int = SEED) -> list[Image.Image]:
    """`count` shape scenes (they need no sprites)."""
    from tiny_base.render import draw_scene
    from tiny_base.world import sample_scene

    rng = np.random.default_rng(seed)
    images: list[Image.Image] = []
    while len(images) < count:
        scene = sample_scene(rng)
        if scene.is_shape:
            images.append(Image.fromarray(draw_scene(scene, None)))
    return images


@torch.no_grad()
def compute_world_mean(encoder: EffnetEncoder, count: int = COUNT, seed: int = SEED) -> Tensor:
    """Mean pooled feature   # (1280,), fp32."""
    images = draw_world(count, seed)
    parts = [
        encoder.pooled(stack_images(images[i : i + 32], encoder.how)).sum(dim=0)
        for i in range(0, count, 32)
    ]
    return torch.stack(parts).sum(dim=0) / count


def main() -> None:
    """Writes the mean beside this file."""
    from efficientnet_lite_pytorch import EfficientNet

    from lcp_plugin.evaluation.checkpoints import read_checkpoint
    from lcp_plugin.evaluation.metrics import find_weights

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(read_checkpoint(find_weights("effnet", None).weights))
    mean = compute_world_mean(EffnetEncoder(model, torch.zeros(()), "cpu"))
    about = f"mean EfficientNet-Lite0 feature over {COUNT} shape scenes of tiny.world, seed {SEED}"
    write_tensors(EFFNET_MEAN, {"mean": mean}, {"about": about})


if __name__ == "__main__":
    main()
