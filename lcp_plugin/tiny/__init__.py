"""The embedded base `tiny-sdxl`: a really pretrained, very small SDXL that ships with the package.

`model_dir` is all that a model loader needs; it imports nothing but the standard library.
How the model was made: `tools/pretrain_tiny_base.py`; what it can do: `model/README.md`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["NAME", "model_dir"]

NAME = "tiny-sdxl"


def model_dir() -> Path:
    """Folder of the embedded base, in diffusers' pipeline layout."""
    return Path(__file__).resolve().parent / "model"
