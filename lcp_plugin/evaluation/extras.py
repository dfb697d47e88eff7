"""More than the paper measures: what leaks, drifts and blurs between concepts.

Each measure is a row of `EXTRAS`: the sentence that the report prints, how it is taken, and which
of its numbers fit into a row. Images are made under the same protocol as the scores' own, into
folders of their own, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage
from lcp_plugin.evaluation.evaluate import Evaluation
from lcp_plugin.evaluation.losses import Prober, describe_losses
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.pictures import Stage
from lcp_plugin.evaluation.recognition import share_of_ceiling
from lcp_plugin.evaluation.scores import mean_cosine, none_if_nan
from lcp_plugin.sdxl.base_weights import BaseSource

Facts = Mapping[str, Any]
Numbers = list[tuple[str, float]]  # of a row of the report; NaN where there is none

GENERIC = (
    "a photo of a dog on the grass",
    "a red car in front of a house",
    "a bowl of fruit on a table",
    "a portrait of an old man",
    "a mountain lake in the snow",
    "a city street at night",
)


@dataclass
class Measuring:
    """The chains that are measured together, and what they share."""

    evaluation: Evaluation
    chains: Sequence[Chain]
    metric: Metric
    probers: dict[BaseSource, Prober] = field(default_factory=dict)

    def losses(self, chain: Chain, entry: Facts) -> dict[str, Any]:
        """`describe_losses`, with one prober for each base."""
        alone = [c for c in self.chains if c.strategy == "independent"]
        if chain.base not in self.probers:
            seed = self.evaluation.protocol.sampling.seed
            file = self.evaluation.folder / "losses.json"
            self.probers[chain.base] = Prober(self.evaluation.studio(chain.base), seed, file)
        prober = self.probers[chain.base]
        found = describe_losses(prober, chain, entry, alone, self.metric)
        prober.save()
        return found


def measure_extras(
    evaluation: Evaluation,
    chains: Sequence[Chain],
    entries: Sequence[Facts],
    names: Sequence[str],
) -> dict[str, Any]:
    """The named measures of the chains that they mean something for: {"about", "runs": ...}."""
    usable = [m for m in evaluation.metrics if not m.against_prompt]
    runs: dict[str, Any] = {}
    if usable:
        setting = Measuring(evaluation, chains, usable[0])
        for chain, entry in zip(chains, entries, strict=True):
            chosen = [EXTRAS[n] for n in names if EXTRAS[n].of_bounds or not chain.is_ceiling]
            if chain.stages and chosen:
                runs[chain.name] = {e.name: e.measure(setting, chain, entry) for e in chosen}
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


def measure_way(evaluation: Evaluation, chain: Chain, metric: Metric) -> dict[str, Any]:
    """How many images were recognised, and how much of the way to the ceiling was covered: each
    task right after it was learned, under the final model, and under the base.
    """
    base, count = base_stage(chain.base_hash), len(chain.tasks)
    cells = chain.cells()
    after = [min(j for i, j in cells if i == task) for task in range(count)]
    final = [max(j for i, j in cells if i == task) for task in range(count)]
    states = {
        "learned": [chain.stages[j] for j in after],
        "final": [chain.stages[j] for j in final],
        "base": [base] * count,
    }
    shares = {
        name: [evaluation.look(metric, chain, i, s).share for i, s in enumerate(chosen)]
        for name, chosen in states.items()
    }
    ceiling = [_score_of_vae(evaluation, chain, metric, task) for task in chain.tasks]
    pairs = zip(states["learned"], chain.tasks, strict=True)
    learned = [evaluation.score(metric, stage, task) for stage, task in pairs]
    at_base = [evaluation.score(metric, base, task) for task in chain.tasks]
    covered = share_of_ceiling(learned, at_base, ceiling)
    return {
        "recognised": shares,
        "ceiling": ceiling,
        "covered": [none_if_nan(v) for v in covered.tolist()],
        "mean": {
            **{name: float(np.mean(values)) for name, values in shares.items()},
            "covered": none_if_nan(float(np.mean(covered))),
        },
    }


def _score_of_vae(evaluation: Evaluation, chain: Chain, metric: Metric, task: EvalTask) -> float:
    cache = evaluation.cache(metric.encoder)
    returned = cache.embed_files(evaluation.mirrors(chain, task)).numpy()
    return mean_cosine(returned, cache.embed_files(task.references).numpy())


def _draw(
    evaluation: Evaluation, chain: Chain, tasks: Sequence[EvalTask], stages: Sequence[Stage]
) -> None:
    extended = replace(chain, tasks=tuple(tasks))
    evaluation.draw(extended, [(i, stage) for stage in stages for i in range(len(tasks))])


def _embed(evaluation: Evaluation, metric: Metric, stage: Stage, task: EvalTask) -> Any:
    paths = [p.path for p in evaluation.pictures(stage, task)]
    return evaluation.cache(metric.encoder).embed_files(paths).numpy()


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Extra:
    """A measure beyond the paper."""

    name: str
    title: str
    about: str
    measure: Callable[[Measuring, Chain, Facts], dict[str, Any]]  # Facts: the chain's entry
    numbers: Callable[[Facts], Numbers]  # of what `measure` found
    of_bounds: bool = False  # whether it has a meaning without a sequence of tasks


EXTRAS: Mapping[str, Extra] = {
    e.name: e
    for e in (
        Extra(
            "bleed",
            "Bleeding",
            "Images of one concept's prompts against the pictures of every other: off the "
            "diagonal, concepts run into each other where they exceed the base's.",
            lambda m, chain, _: measure_bleed(m.evaluation, chain, m.metric),
            lambda found: [
                ("off the diagonal", _off_diagonal(found["matrix"])),
                ("base, off the diagonal", _off_diagonal(found["base"])),
            ],
        ),
        Extra(
            "leakage",
            "Class-word leakage",
            "The prompt without the rare token (“a sneaker”) against the concept's pictures, "
            "less the base's score: how far the class word itself was taken over.",
            lambda m, chain, _: measure_leakage(m.evaluation, chain, m.metric),
            lambda found: [("mean", _number(found.get("mean")))],
        ),
        Extra(
            "drift",
            "Drift of everything else",
            "Everyday prompts with the same noise, before and after: 1 - cosine to the base's "
            "own image, so 0 means that the rest of the model is untouched.",
            lambda m, chain, _: measure_drift(m.evaluation, chain, m.metric),
            lambda found: [(f"after {i}", value) for i, value in enumerate(found["after"], 1)],
        ),
        Extra(
            "diversity",
            "Diversity",
            "1 - mean cosine between images of one prompt: near 0 the model draws one picture "
            "over and over.",
            lambda m, chain, _: measure_diversity(m.evaluation, chain, m.metric),
            lambda found: [
                (key, _mean([v for v in found[key].values() if v is not None]))
                for key in ("final", "base")
            ],
        ),
        Extra(
            "multi",
            "Two concepts at once",
            "Two concepts in one prompt, scored against each one's pictures; the weaker of the "
            "two counts.",
            lambda m, chain, _: measure_multi(m.evaluation, chain, m.metric),
            lambda found: [("mean", _number(found.get("mean")))],
        ),
        Extra(
            "recognition",
            "Images recognised, and the way covered",
            "Share of a concept's images whose nearest picture, among those of all concepts, is "
            "its own, all as the VAE returns them; and how much of the way from the base's score "
            "to that of its pictures so returned was covered by learning it.",
            lambda m, chain, _: measure_way(m.evaluation, chain, m.metric),
            lambda found: [
                *((f"recognised, {k}", found["mean"][k]) for k in ("learned", "final", "base")),
                ("way covered", _number(found["mean"]["covered"])),
            ],
            of_bounds=True,
        ),
        Extra(
            "losses",
            "Without images",
            "The error of the prediction on fixed noise over the tasks' own pictures, 0 as the "
            "base, 1 as a model that learned this task alone; and how far predictions moved since "
            "learning, in units of what learning moved.",
            lambda m, chain, entry: m.losses(chain, entry),
            lambda found: [
                ("normalised, final", _mean_of_finals(found["normalised"])),
                ("self-drift, final", _mean_of_finals(found["self_drift"])),
                *(
                    (f"rank correlation of {title} with the scores", _number(rank))
                    for title, rank in (
                        ("loss gain", found["rank_correlation"]["loss_gain"]),
                        ("self-drift", found["rank_correlation"]["self_drift"]),
                    )
                ),
            ],
        ),
    )
}


def choose_extras(names: Sequence[str]) -> list[str]:
    """Names of measures, each once; ConfigError lists those that exist."""
    unknown = [name for name in names if name not in EXTRAS]
    if unknown:
        raise ConfigError(f"--extras {unknown[0]}: unknown; there are {', '.join(EXTRAS)}.")
    return list(dict.fromkeys(names))


ABOUT: Mapping[str, str] = {name: extra.about for name, extra in EXTRAS.items()}


def _off_diagonal(rows: Sequence[Sequence[float]]) -> float:
    return _mean([v for i, row in enumerate(rows) for j, v in enumerate(row) if i != j])


def _mean_of_finals(rows: Sequence[Sequence[float | None]]) -> float:
    return _mean([row[-1] for row in rows if row[-1] is not None])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
