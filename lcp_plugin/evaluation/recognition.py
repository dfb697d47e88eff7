"""Is it the learned object? Samples against the references of all tasks, by the nearest one.

recognised   share of a task's images whose nearest reference (largest cosine among the
             references of all tasks) is one of the task's own: right after it was learned,
             under the final model, and under the base
ceiling      score of the references as the VAE returns them at the base's resolution: no
             sample of this base can be expected to be nearer
covered      (R[i, i] - base) / (ceiling - base): how far of the way learning came
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage
from lcp_plugin.evaluation.encoders import Metric
from lcp_plugin.evaluation.evaluate import Evaluation
from lcp_plugin.evaluation.losses import encode_images
from lcp_plugin.evaluation.pictures import Stage
from lcp_plugin.evaluation.scores import mean_cosine, none_if_nan


def measure_recognition(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """Shares, ceiling and covered way of every task of a chain, and their means over tasks."""
    base = base_stage(chain.base_hash)
    count = len(chain.tasks)
    after = [min(j for i, j in chain.cells() if i == task) for task in range(count)]
    final = [max(j for i, j in chain.cells() if i == task) for task in range(count)]
    stages = {
        "learned": [chain.stages[j] for j in after],
        "final": [chain.stages[j] for j in final],
        "base": [base] * count,
    }
    shares = {
        name: [_recognised(evaluation, chain, metric, i, s) for i, s in enumerate(chosen)]
        for name, chosen in stages.items()
    }
    ceiling = [_score_of_vae(evaluation, chain, metric, task) for task in chain.tasks]
    pairs = zip(stages["learned"], chain.tasks, strict=True)
    learned = [evaluation.score(metric, stage, task) for stage, task in pairs]
    at_base = [evaluation.score(metric, base, task) for task in chain.tasks]
    covered = cover(learned, at_base, ceiling)
    return {
        "recognised": shares,
        "ceiling": ceiling,
        "covered": [none_if_nan(v) for v in covered.tolist()],
        "mean": {
            **{name: float(np.mean(values)) for name, values in shares.items()},
            "covered": none_if_nan(float(np.mean(covered))),
        },
    }


def share_recognised(images: ArrayLike, references: list[ArrayLike], own: int) -> float:
    """Share of rows of `images` (n, d) whose largest cosine is with a row of references[own].

    All rows are L2-normalised; a tie with another task's reference counts as not recognised.
    """
    rows = np.asarray(images, dtype=np.float64)
    nearest = np.stack([(rows @ np.asarray(r, dtype=np.float64).T).max(1) for r in references])
    others = np.delete(nearest, own, axis=0)
    if not len(others):
        return 1.0
    return float((nearest[own] > others.max(0)).mean())


def cover(learned: ArrayLike, base: ArrayLike, ceiling: ArrayLike) -> NDArray[np.float64]:
    """(learned - base) / (ceiling - base) of every task   # (tasks,); NaN where nothing lies
    between base and ceiling."""
    low, high = np.asarray(base, dtype=np.float64), np.asarray(ceiling, dtype=np.float64)
    way = high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.asarray(learned, dtype=np.float64) - low) / way
    return np.asarray(np.where(way > 0, share, np.nan), dtype=np.float64)


def _recognised(
    evaluation: Evaluation, chain: Chain, metric: Metric, own: int, stage: Stage
) -> float:
    cache = evaluation.cache(metric.encoder)
    files = [p.path for p in evaluation.pictures(stage, chain.tasks[own])]
    references = [cache.embed_files(task.references).numpy() for task in chain.tasks]
    return share_recognised(cache.embed_files(files).numpy(), list(references), own)


@torch.no_grad()
def _score_of_vae(evaluation: Evaluation, chain: Chain, metric: Metric, task: EvalTask) -> float:
    from lcp_plugin.sdxl.sample import decode_latents

    pipeline = evaluation.studio(chain.base).pipeline()
    images = decode_latents(pipeline, encode_images(pipeline, task.references))
    cache = evaluation.cache(metric.encoder)
    returned = cache.encoder.embed(images).numpy()
    return mean_cosine(returned, cache.embed_files(task.references).numpy())
