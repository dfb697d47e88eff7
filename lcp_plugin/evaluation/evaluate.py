"""Chains to scores: images of every cell, embeddings, matrices, tables.

One `Evaluation` holds what is loaded once: the model (a `Studio` per base), the encoders with their
caches, and the base's scores, which chains on one base share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from lcp_plugin.errors import DataError
from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage, require_references
from lcp_plugin.evaluation.embeddings import EmbeddingCache, score_files
from lcp_plugin.evaluation.encoders import Metric, load_encoder
from lcp_plugin.evaluation.generate import Picture, Stage, Studio, plan_pictures
from lcp_plugin.evaluation.protocols import Protocol
from lcp_plugin.evaluation.scores import Matrix, Summary, none_if_nan, spread, summarise
from lcp_plugin.evaluation.tables import (
    Column,
    Row,
    Table,
    to_csv,
    to_latex,
    to_markdown,
)
from lcp_plugin.files import write_bytes, write_json

logger = logging.getLogger(__name__)
FORMAT = 1
COLUMNS = {
    "average_score": "S",
    "forgetting": "F",
    "forgetting_chaudhry": "F (Chaudhry)",
    "peak": "peak",
    "retention": "retention",
    "learning_score": "learning",
    "worst_task": "worst",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = {"independent": "independent (ceiling)", "joint": "joint (ceiling)",
        "merge_at_end": "merge at end (bound)"}  # fmt: skip


@dataclass
class Evaluation:
    """Scores chains under one protocol, keeping images and embeddings in `folder`."""

    folder: Path
    metrics: Sequence[Metric]
    protocol: Protocol
    encoder_paths: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "fp32"  # of UNet and text encoders
    batch_size: int = 8
    vae: str | None = None
    encoder_device: str | None = None
    studios: dict[str, Studio] = field(default_factory=dict)
    caches: dict[str, EmbeddingCache] = field(default_factory=dict)

    def studio(self, base: str) -> Studio:
        """The image maker of a base."""
        if base not in self.studios:
            self.studios[base] = Studio(
                base,
                self.protocol.sampling,
                self.device,
                DTYPES[self.dtype],
                self.batch_size,
                self.vae,
            )
        return self.studios[base]

    def cache(self, encoder: str) -> EmbeddingCache:
        """The encoder with its cache, loaded at the first call."""
        if encoder not in self.caches:
            loaded = load_encoder(
                encoder, self.encoder_paths.get(encoder), self.encoder_device or self.device
            )
            self.caches[encoder] = EmbeddingCache(loaded, self.folder / "embeddings")
        return self.caches[encoder]

    def load_encoders(self) -> None:
        """Loads every encoder now, so that missing weights are told before images are made."""
        for metric in self.metrics:
            self.cache(metric.encoder)

    def pictures(self, stage: Stage, task: EvalTask) -> list[Picture]:
        """The images of one cell."""
        return plan_pictures(
            self.folder / "images", stage, task.name, task.prompts, self.protocol.sampling
        )

    def draw(self, chain: Chain, cells: Sequence[tuple[int, Stage]]) -> None:
        """Makes the missing images of cells (task, stage), each state of the model once."""
        studio = self.studio(chain.base)
        for stage in dict.fromkeys(stage for _, stage in cells):
            tasks = [chain.tasks[i] for i, s in cells if s == stage]
            pictures = [p for task in tasks for p in self.pictures(stage, task)]
            made = studio.make(stage, pictures)
            if made:
                logger.info("%s, %s: %d images made", chain.name, stage.name, made)

    def score(self, metric: Metric, stage: Stage, task: EvalTask) -> float:
        """One cell of one metric; its images must be there."""
        pictures = self.pictures(stage, task)
        prompts = [p.prompt.replace(task.concept, task.class_words) for p in pictures]
        return score_files(
            metric,
            self.cache(metric.encoder),
            [p.path for p in pictures],
            task.references,
            prompts,
        )

    def score_chain(self, chain: Chain) -> dict[str, Any]:
        """The chain's entry in scores.json: matrices, base, numbers, per metric."""
        require_references(chain)
        base = base_stage(chain.base_hash)
        cells = chain.cells()
        self.draw(chain, [(i, base) for i in range(len(chain.tasks))])
        self.draw(chain, [(i, chain.stages[j]) for i, j in cells])
        found: dict[str, Any] = {}
        for metric in self.metrics:
            values = {c: self.score(metric, chain.stages[c[1]], chain.tasks[c[0]]) for c in cells}
            at_base = [self.score(metric, base, task) for task in chain.tasks]
            self.cache(metric.encoder).save()
            found[metric.name] = _describe_metric(chain, values, at_base)
        return _describe_chain(chain) | {"metrics": found}

    def facts(self) -> dict[str, Any]:
        """What the scores depend on besides the chains."""
        return {
            "format": FORMAT,
            "sampling": asdict(self.protocol.sampling),
            "encoders": {
                m.name: {"weights_sha256": self.cache(m.encoder).encoder.fingerprint}
                for m in self.metrics
            },
        }


def _describe_chain(chain: Chain) -> dict[str, Any]:
    return {
        "name": chain.name,
        "path": chain.path,
        "strategy": chain.strategy,
        "strategy_args": list(chain.strategy_args),
        "label": chain.label,
        "seed": chain.seed,
        "order_seed": chain.order_seed,
        "base": {"name": chain.base, "hash": chain.base_hash},
        "tasks": [task.name for task in chain.tasks],
        "stages": [{"name": s.name, "weights": s.weights} for s in chain.stages],
        "ceiling": chain.is_ceiling or not chain.stages,
    }


def _describe_metric(
    chain: Chain, values: Mapping[tuple[int, int], float], base: Sequence[float]
) -> dict[str, Any]:
    if not chain.stages:  # the base alone
        return {"final": list(base), "base": list(base), "average_score": _mean(base)}
    if chain.is_ceiling:
        final = [values[cell] for cell in chain.cells()]
        mean = sum(final) / len(final)
        return {"final": final, "base": list(base), "average_score": mean}
    matrix = measures.fill_matrix(values, len(chain.tasks))
    summary = summarise(matrix, sum(base) / len(base))
    return {
        "matrix": [[none_if_nan(v) for v in row] for row in matrix.tolist()],
        "base": list(base),
        "summary": summary.to_json(),
    }


# ------------------------------------------------------------------------------ over runs


def matrix_of(entry: Mapping[str, Any], metric: str) -> Matrix:
    """A run's matrix back from scores.json, NaN for null."""
    rows = entry["metrics"][metric]["matrix"]
    filled = [[math.nan if v is None else float(v) for v in row] for row in rows]
    return measures.check_matrix(filled)


def summary_of(entry: Mapping[str, Any], metric: str) -> Summary:
    """A run's numbers, from its matrix."""
    base = entry["metrics"][metric]["base"]
    return summarise(matrix_of(entry, metric), sum(base) / len(base))


def build_table(entries: Sequence[Mapping[str, Any]], metric: Metric) -> Table:
    """The paper's table: the base, every strategy's mean and std over runs, the ceilings."""
    columns = tuple(
        Column(title, key in measures.LOWER_IS_BETTER) for key, title in COLUMNS.items()
    )
    empty: list[None] = [None] * (len(columns) - 1)
    bases = [_mean(e["metrics"][metric.name]["base"]) for e in entries]
    rows = [Row("base", (spread(bases), *empty), competes=False)]
    for label, group in _by_label(e for e in entries if not e["ceiling"]).items():
        summaries = [summary_of(e, metric.name) for e in group]
        cells = tuple(spread([getattr(s, key) for s in summaries]) for key in COLUMNS)
        rows.append(Row(label, cells))
    for label, group in _by_label(e for e in entries if e["ceiling"] and e["stages"]).items():
        finals = [e["metrics"][metric.name]["average_score"] for e in group]
        rows.append(Row(ROWS.get(label, label), (spread(finals), *empty), competes=False))
    caption = f"{metric.title}: mean and population std over runs; {metric.about}"
    return Table(columns, tuple(rows), corner=metric.title, caption=caption)


def _by_label(entries: Any) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["label"], []).append(entry)
    return groups


def compare_strategies(
    entries: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Paired bootstrap intervals of every two strategies over the (order, seed) they share."""
    groups = _by_label(e for e in entries if not e["ceiling"])
    found: list[dict[str, Any]] = []
    for (name_a, a), (name_b, b) in combinations(groups.items(), 2):
        pairs = _pair_runs(a, b)
        if len(pairs) < 2:
            continue
        for metric in metrics:
            summaries = [(summary_of(x, metric.name), summary_of(y, metric.name)) for x, y in pairs]
            for key in ("average_score", "forgetting", "peak", "retention"):
                left = [getattr(x, key) for x, _ in summaries]
                right = [getattr(y, key) for _, y in summaries]
                if any(math.isnan(v) for v in [*left, *right]):
                    continue
                interval = measures.bootstrap_difference(left, right)
                facts = {"a": name_a, "b": name_b, "metric": metric.name, "measure": key}
                found.append(facts | asdict(interval))
    return found


def _pair_runs(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Runs of the same tasks in the same order from the same seed."""
    keyed = {_pair_key(e): e for e in b}
    return [(e, keyed[_pair_key(e)]) for e in a if _pair_key(e) in keyed]


def _pair_key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["seed"], entry["order_seed"], tuple(entry["tasks"])


def collect_scores(
    evaluation: Evaluation, entries: Sequence[Mapping[str, Any]], extras: Mapping[str, Any]
) -> dict[str, Any]:
    """All of scores.json."""
    strategies: dict[str, Any] = {}
    for label, group in _by_label(e for e in entries if not e["ceiling"]).items():
        strategies[label] = {
            metric.name: {
                key: _spread_json([getattr(summary_of(e, metric.name), key) for e in group])
                for key in COLUMNS
            }
            for metric in evaluation.metrics
        }
    return {
        **evaluation.facts(),
        "runs": list(entries),
        "strategies": strategies,
        "differences": compare_strategies(entries, evaluation.metrics),
        **extras,
    }


def _spread_json(values: Sequence[float]) -> dict[str, Any]:
    over = spread(values)
    return {"mean": none_if_nan(over.mean), "std": none_if_nan(over.std), "runs": over.count}


def write_scores(evaluation: Evaluation, scores: Mapping[str, Any], output: Path) -> list[Table]:
    """scores.json, and per metric a table as .md, .csv and .tex and all cells; the tables."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "scores.json", scores)
    tables = [build_table(scores["runs"], metric) for metric in evaluation.metrics]
    for metric, table in zip(evaluation.metrics, tables, strict=True):
        for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
            write_bytes(output / f"{metric.name}.{suffix}", write(table).encode("utf-8"))
        matrices = matrices_csv(scores["runs"], metric)
        write_bytes(output / f"{metric.name}_matrices.csv", matrices.encode("utf-8"))
    return tables


def matrices_csv(entries: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Every cell of every run: run, task, after, score; the base as `after` = base."""
    lines = ["run,task,after,score"]
    for entry in entries:
        found, name = entry["metrics"][metric.name], entry["name"]
        tasks = entry["tasks"]
        cells = [(task, "base", v) for task, v in zip(tasks, found["base"], strict=True)]
        for task, row in zip(tasks, found.get("matrix", ()), strict=False):
            cells += [(task, a, v) for a, v in zip(tasks, row, strict=True) if v is not None]
        cells += [(t, "final", v) for t, v in zip(tasks, found.get("final", ()), strict=False)]
        lines += [f"{name},{task},{after},{value!r}" for task, after, value in cells]
    return "\n".join(lines) + "\n"


def tell_differences(scores: Mapping[str, Any]) -> str:
    """One line per paired difference of S and F with its interval, and per rank correlation."""
    lines = []
    for d in scores["differences"]:
        if d["measure"] in ("average_score", "forgetting"):
            interval = f"[{d['low']:+.3f}, {d['high']:+.3f}]"
            lines.append(
                f"{d['metric']} {COLUMNS[d['measure']]}: {d['a']} - {d['b']} = "
                f"{d['difference']:+.3f} {interval} ({d['level']:.0%}, {d['pairs']} pairs)"
            )
    for name, extras in scores.get("extras", {}).get("runs", {}).items():
        for key, value in extras.get("losses", {}).get("rank_correlation", {}).items():
            told = "undefined" if value is None else f"{value:+.2f}"
            lines.append(f"{name}: rank correlation of {key} with the image scores {told}")
    return "\n".join(lines)


def score_folders(
    generated: Sequence[Path],
    references: Sequence[Path],
    metrics: Sequence[Metric],
    caches: Mapping[str, EmbeddingCache],
    prompts: Sequence[str] = (),
) -> dict[str, float]:
    """Two sets of images, compared by every metric; prompts are needed by clip_t only.

    Raises:
        DataError: clip_t without a prompt for every generated image.
    """
    for metric in metrics:
        if metric.against_prompt and len(prompts) != len(generated):
            raise DataError(
                f"{metric.name} needs the prompt of every generated image: in the PNG's metadata "
                "(key prompt), or one for all with --prompt."
            )
    return {
        m.name: score_files(m, caches[m.encoder], generated, references, prompts) for m in metrics
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
