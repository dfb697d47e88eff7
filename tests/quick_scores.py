"""Scores of toy runs without a large encoder: thumbnails for embeddings, two images, two steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lcp_plugin.evaluation import command, encoders
from lcp_plugin.evaluation.images import Preprocessing

ROOT = Path(__file__).resolve().parents[1]


FAST = ("--images", "2", "--steps", "2", "--prompts", "1")


class Thumbnail(encoders.Encoder):
    """A 4 x 4 thumbnail as the embedding: quick, and different for different pictures."""

    fingerprint = "7" * 64
    how = Preprocessing(4, 4, (0.5, 0.5, 0.5), (1, 1, 1))

    def __init__(self):
        self.name, self.device = "effnet", "cpu"

    def features(self, pixels):
        return pixels.flatten(1)


def score(runs, output, references, *more):
    """The parsed scores.json of `lcp evaluate`."""
    argv = [*map(str, runs), "--output", str(output), "--references", str(references)]
    command.run_command([*argv, *(() if "--images" in more else FAST), *more])
    return json.loads((output / "scores.json").read_text("utf-8"))


def made_in(folder):
    """Image -> what tells whether it was written again."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*.png"))}
    return {path: (s.st_ino, s.st_mtime_ns, s.st_size) for path, s in stats.items()}


def photo(width=90, height=61, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
