"""The metrics that there are: one table. It names networks and loads none, so a page that titles
scores by it needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a column of a table is."""

    name: str
    encoder: str
    title: str
    against_prompt: bool = False  # clip_t: the prompt, not the reference images
    about: str = ""


METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("clip_i", "clip", "CLIP-I", about="same subject, by CLIP's eye"),
        Metric("clip_t", "clip", "CLIP-T", True, "does the picture show what the prompt says"),
        Metric("dino", "dino", "DINO", about="same subject, with its details"),
        Metric("dinov2", "dinov2", "DINOv2", about="same subject, a newer eye"),
        Metric("csd", "csd", "CSD", about="same style, whatever is shown"),
        Metric("effnet", "effnet", "EffNet", about="same subject, by the encoder that needs no "
               "download"),
    )
}  # fmt: skip


def title_of(metric: str) -> str:
    """What tables and pages call a metric; one that is not ours keeps its own name."""
    return METRICS[metric].title if metric in METRICS else metric
