"""The libraries of a training run, imported ahead of it.

A sweep's runs are forked from a server that has imported this (multiprocessing's `forkserver`):
each is a process of its own, as fresh as one from the command line, without its start-up.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from lcp_plugin.sdxl.load import hush_libraries

hush_libraries()
for _name in (
    "accelerate",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.schedulers.scheduling_euler_discrete",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "matplotlib.figure",  # the report's
    "jinja2",
):
    with suppress(ImportError):
        importlib.import_module(_name)
