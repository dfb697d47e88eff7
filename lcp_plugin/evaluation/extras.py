"""More than the paper measures: what leaks, drifts and blurs between concepts.

Each measure has one sentence in `ABOUT`, which the report prints. Images are made under the same
protocol as the scores' own, into folders of their own, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage
from lcp_plugin.evaluation.encoders import Metric
from lcp_plugin.evaluation.evaluate import Evaluation
from lcp_plugin.evaluation.losses import Prober, losses_alone, measure_losses
from lcp_plugin.evaluation.pictures import Stage
from lcp_plugin.evaluation.recognition import measure_recognition
from lcp_plugin.evaluation.scores import mean_cosine, none_if_nan, normalise_losses
from lcp_plugin.sdxl.base_weights import BaseSource

ABOUT: Mapping[str, str] = {
    "bleed": "Images of one concept's prompts against the pictures of every other: off the "
    "diagonal, concepts run into each other where they exceed the base's.",
    "leakage": "The prompt without the rare token (“a sneaker”) against the concept's pictures, "
    "less the base's score: how far the class word itself was taken over.",
    "drift": "Everyday prompts with the same noise, before and after: 1 - cosine to the base's "
    "own image, so 0 means that the rest of the model is untouched.",
    "diversity": "1 - mean cosine between images of one prompt: near 0 the model draws one picture "
    "over and over.",
    "multi": "Two concepts in one prompt, scored against each one's pictures; the weaker of the "
    "two counts.",
    "recognition": "Share of a concept's images whose nearest picture, among those of all "
    "concepts, is its own; and how much of the way from the base's score to that of its pictures "
    "as the VAE returns them was covered by learning it.",
    "losses": "The error of the prediction on fixed noise over the tasks' own pictures, 0 as the "
    "base, 1 as a model that learned this task alone; and how far predictions moved since "
    "learning, in units of what learning moved.",
}
OF_CEILINGS = frozenset({"recognition"})  # what has a meaning without a sequence of tasks
GENERIC = (
    "a photo of a dog on the grass",
    "a red car in front of a house",
    "a bowl of fruit on a table",
    "a portrait of an old man",
    "a mountain lake in the snow",
    "a city street at night",
)


def measure_extras(
    evaluation: Evaluation,
    chains: Sequence[Chain],
    entries: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> dict[str, Any]:
    """The named measures of every chain that is not a ceiling: {"about", "runs": {name: ...}}."""
    usable = [m for m in evaluation.metrics if not m.against_prompt]
    measured: dict[str, Callable[[Chain, Metric], dict[str, Any]]] = {
        "bleed": lambda chain, metric: measure_bleed(evaluation, chain, metric),
        "leakage": lambda chain, metric: measure_leakage(evaluation, chain, metric),
        "drift": lambda chain, metric: measure_drift(evaluation, chain, metric),
        "diversity": lambda chain, metric: measure_diversity(evaluation, chain, metric),
        "multi": lambda chain, metric: measure_multi(evaluation, chain, metric),
        "recognition": lambda chain, metric: measure_recognition(evaluation, chain, metric),
    }
    alone = [c for c in chains if c.strategy == "independent"]
    probers: dict[BaseSource, Prober] = {}
    runs: dict[str, Any] = {}
    for chain, entry in zip(chains, entries, strict=True):
        if not chain.stages or not usable:
            continue
        possible = [n for n in names if not chain.is_ceiling or n in OF_CEILINGS]
        found: dict[str, Any] = {
            n: measured[n](chain, usable[0]) for n in possible if n in measured
        }
        if "losses" in possible:
            prober = probers.setdefault(chain.base, _prober(evaluation, chain))
            found["losses"] = describe_losses(prober, chain, entry, alone, usable[0])
            prober.save()
        if found:
            runs[chain.name] = found
    for cache in evaluation.caches.values():
        cache.save()
    metric_name = usable[0].name if usable else ""
    return {"metric": metric_name, "about": {n: ABOUT[n] for n in names}, "runs": runs}


def measure_bleed(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """B[i, j]: the final model's images of task i against references of task j; the base's too."""
    return {
        "matrix": _bleed(evaluation, chain, metric, chain.stages[-1]),
        "base": _bleed(evaluation, chain, metric, base_stage(chain.base_hash)),
    }


def _bleed(evaluation: Evaluation, chain: Chain, metric: Metric, stage: Stage) -> list[list[float]]:
    rows = []
    for task in chain.tasks:
        images = _embed(evaluation, metric, stage, task)
        cache = evaluation.cache(metric.encoder)
        rows.append(
            [mean_cosine(images, cache.embed_files(t.references).numpy()) for t in chain.tasks]
        )
    return rows


def measure_leakage(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """Score of the class word alone under the final model less the base's, per object task."""
    tasks = [
        replace(
            task,
            name=f"{task.name}.class",
            prompts=tuple(p.replace(task.concept, task.class_words) for p in task.prompts),
        )
        for task in chain.tasks
        if task.kind == "object" and task.class_words != task.concept
    ]
    final, base = chain.stages[-1], base_stage(chain.base_hash)
    _draw(evaluation, chain, tasks, (final, base))
    leaks = {
        task.name.removesuffix(".class"): evaluation.score(metric, final, task)
        - evaluation.score(metric, base, task)
        for task in tasks
    }
    return {"per_task": leaks, "mean": _mean(list(leaks.values()))}


def measure_drift(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """1 - cosine to the base's image of the same prompt and noise, after every task."""
    task = EvalTask(0, "generic", "object", "", GENERIC)
    base = base_stage(chain.base_hash)
    _draw(evaluation, chain, [task], (base, *chain.stages))
    before = _embed(evaluation, metric, base, task)
    after = [_embed(evaluation, metric, stage, task) for stage in chain.stages]
    return {"after": [float(1 - (before * now).sum(axis=1).mean()) for now in after]}


def measure_diversity(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """Of the final model and the base: mean over prompts of 1 - mean cosine, per task."""
    found: dict[str, Any] = {}
    count = evaluation.protocol.sampling.images
    for name, stage in (("final", chain.stages[-1]), ("base", base_stage(chain.base_hash))):
        per_task = {}
        for task in chain.tasks:
            rows = _embed(evaluation, metric, stage, task)
            prompts = [rows[i : i + count] for i in range(0, len(rows), count)]
            per_task[task.name] = none_if_nan(_mean([measures.diversity(p) for p in prompts]))
        found[name] = per_task
    return found


def measure_multi(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """Neighbours in the order, "a {first} next to a {second}": score against both, final model."""
    objects = [t for t in chain.tasks if t.kind == "object"]
    final = chain.stages[-1]
    pairs: list[dict[str, Any]] = []
    for first, second in zip(objects, objects[1:], strict=False):
        prompt = f"a {first.concept} next to a {second.concept}"
        name = f"{first.name}+{second.name}"
        task = replace(first, name=name, prompts=(prompt,), concept=first.concept)
        _draw(evaluation, chain, [task], (final,))
        both = [
            evaluation.score(metric, final, replace(task, references=t.references))
            for t in (first, second)
        ]
        pairs.append({"prompt": prompt, "scores": both, "weaker": min(both)})
    return {"pairs": pairs, "mean": none_if_nan(_mean([p["weaker"] for p in pairs]))}


def describe_losses(
    prober: Prober,
    chain: Chain,
    entry: Mapping[str, Any],
    alone: Sequence[Chain],
    metric: Metric,
) -> dict[str, Any]:
    """Loss matrix (normalised where an `independent` run of the same tasks is there), self-drift,
    and their rank correlation with the image scores.
    """
    found = measure_losses(prober, chain)
    image_scores = np.array(entry["metrics"][metric.name]["matrix"], dtype=float)
    twin = next(
        (c for c in alone if {t.name for t in c.tasks} == {t.name for t in chain.tasks}), None
    )
    normalised = np.full_like(found["losses"], np.nan)
    if twin is not None:
        own = losses_alone(prober, twin)
        reference = [own[task.name] for task in chain.tasks]
        normalised = normalise_losses(found["losses"], found["base"], reference)
    gained = 1 - found["losses"] / found["base"][:, None]
    return {
        "losses": _rows(found["losses"]),
        "base": [float(v) for v in found["base"]],
        "normalised": _rows(normalised),
        "self_drift": _rows(found["self_drift"]),
        "rank_correlation": {
            "loss_gain": none_if_nan(measures.rank_correlation(gained, image_scores)),
            "self_drift": none_if_nan(
                measures.rank_correlation(-found["self_drift"], image_scores)
            ),
        },
    }


def _prober(evaluation: Evaluation, chain: Chain) -> Prober:
    seed, file = evaluation.protocol.sampling.seed, evaluation.folder / "losses.json"
    return Prober(evaluation.studio(chain.base), seed, file)


def _draw(
    evaluation: Evaluation, chain: Chain, tasks: Sequence[EvalTask], stages: Sequence[Stage]
) -> None:
    extended = replace(chain, tasks=tuple(tasks))
    evaluation.draw(extended, [(i, stage) for stage in stages for i in range(len(tasks))])


def _embed(evaluation: Evaluation, metric: Metric, stage: Stage, task: EvalTask) -> Any:
    paths = [p.path for p in evaluation.pictures(stage, task)]
    return evaluation.cache(metric.encoder).embed_files(paths).numpy()


def _rows(matrix: Any) -> list[list[float | None]]:
    return [[none_if_nan(v) for v in row] for row in np.asarray(matrix).tolist()]


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
