"""Chains to scores: images of every cell, embeddings, matrices, tables.

One `Evaluation` holds what is loaded once: the model (a `Studio` per base), the encoders with their
caches, and the base's scores, which chains on one base share.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcp_plugin.errors import ScoringError
from lcp_plugin.evaluation import scores as measures
from lcp_plugin.evaluation.chains import Chain, EvalTask, base_stage, require_references
from lcp_plugin.evaluation.embeddings import EmbeddingCache, score_files
from lcp_plugin.evaluation.encoders import TextEncoder
from lcp_plugin.evaluation.metric_table import METRICS, Metric
from lcp_plugin.evaluation.metrics import load_encoder
from lcp_plugin.evaluation.mirrors import mirror_files
from lcp_plugin.evaluation.pictures import Picture, Stage, Studio, plan_pictures
from lcp_plugin.evaluation.protocols import Protocol
from lcp_plugin.evaluation.recognition import Look, Recognition, judge
from lcp_plugin.evaluation.scores import none_if_nan, score_matrix
from lcp_plugin.formats.precisions import PRECISIONS
from lcp_plugin.sdxl.base_weights import BaseSource
from lcp_plugin.telling.wording import counted

logger = logging.getLogger(__name__)
SCORES_FORMAT = 1


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
    studios: dict[BaseSource, Studio] = field(default_factory=dict)
    caches: dict[str, EmbeddingCache] = field(default_factory=dict)
    mirrored: dict[tuple[BaseSource, tuple[Path, ...]], list[Path]] = field(default_factory=dict)

    def studio(self, base: BaseSource) -> Studio:
        """The image maker of a base."""
        if base not in self.studios:
            self.studios[base] = Studio(
                base,
                self.protocol.sampling,
                self.device,
                PRECISIONS[self.dtype],
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
        """Loads every encoder now, so that missing weights are told before images are made; and a
        vocabulary where prompts will be read.
        """
        for metric in self.metrics:
            encoder = self.cache(metric.encoder).encoder
            if metric.against_prompt and isinstance(encoder, TextEncoder):
                encoder.embed_text(("a photo",))

    def pictures(self, stage: Stage, task: EvalTask) -> list[Picture]:
        """The images of one cell."""
        return plan_pictures(
            self.folder / "images", stage, task.name, task.prompts, self.protocol.sampling
        )

    def by_stage(
        self, chain: Chain, cells: Sequence[tuple[int, Stage]]
    ) -> dict[Stage, list[Picture]]:
        """The images of cells (task, stage) by the state of the model that makes them."""
        found: dict[Stage, list[Picture]] = {}
        for i, stage in cells:
            found.setdefault(stage, []).extend(self.pictures(stage, chain.tasks[i]))
        return found

    def draw(self, chain: Chain, cells: Sequence[tuple[int, Stage]]) -> None:
        """Makes the missing images of cells (task, stage), each state of the model once."""
        studio = self.studio(chain.base)
        for stage, pictures in self.by_stage(chain, cells).items():
            made = studio.make(stage, pictures)
            if made:
                logger.info("%s, %s: %s made", chain.name, stage.name, counted(made, "image"))

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
        self.draw(chain, chain.drawn_cells())
        found: dict[str, Any] = {}
        for metric in self.metrics:
            values = {c: self.score(metric, chain.stages[c[1]], chain.tasks[c[0]]) for c in cells}
            at_base = [self.score(metric, base, task) for task in chain.tasks]
            self.cache(metric.encoder).save()
            found[metric.name] = _describe_metric(chain, values, at_base)
        recognised = self.recognise(chain)
        told = {} if recognised is None else {"recognition": recognised.to_json()}
        return _describe_chain(chain) | {"metrics": found} | told

    def recognise(self, chain: Chain) -> Recognition | None:
        """What the chain's tasks look like in every state that is scored, from the same images.

        None where there is nothing to mistake a concept for.
        """
        if len(chain.tasks) < 2 or not chain.stages:
            return None
        metric, base = choose_eye(self.metrics), base_stage(chain.base_hash)
        cells, count = chain.cells(), len(chain.tasks)
        states = {i: [j for own, j in cells if own == i] for i in range(count)}
        shown = states if chain.is_ceiling else dict.fromkeys(states, range(len(chain.stages)))
        looks = tuple(
            tuple(
                self.look(metric, chain, i, chain.stages[j]) if j in states[i] else None
                for j in shown[i]
            )
            for i in range(count)
        )
        return Recognition(
            metric=metric.name,
            images=min(len(self.pictures(base, task)) for task in chain.tasks),
            tasks=tuple(task.name for task in chain.tasks),
            looks=looks,
            base=tuple(self.look(metric, chain, i, base) for i in range(count)),
        )

    def look(self, metric: Metric, chain: Chain, own: int, stage: Stage) -> Look:
        """One task's images in a state of the model, among the references of all."""
        cache, task = self.cache(metric.encoder), chain.tasks[own]
        images = cache.embed_files([p.path for p in self.pictures(stage, task)])
        references = {
            t.name: cache.embed_files(self.mirrors(chain, t)).numpy() for t in chain.tasks
        }
        return judge(images.numpy(), references, task.name)

    def mirrors(self, chain: Chain, task: EvalTask) -> list[Path]:
        """The task's references as the chain's base could show them."""
        key = (chain.base, tuple(task.references))
        if key not in self.mirrored:
            folder = self.folder / "references" / chain.base_hash[:12]
            self.mirrored[key] = mirror_files(self.studio(chain.base), folder, task.references)
        return self.mirrored[key]

    def facts(self) -> dict[str, Any]:
        """What the scores depend on besides the chains."""
        return {
            "format": SCORES_FORMAT,
            "sampling": asdict(self.protocol.sampling),
            "encoders": {
                m.name: {"weights_sha256": self.cache(m.encoder).encoder.fingerprint}
                for m in self.metrics
            },
        }


def choose_eye(metrics: Sequence[Metric]) -> Metric:
    """The metric whose encoder recognises: the first that compares images with images, else one of
    the same encoder that does.
    """
    for metric in metrics:
        if not metric.against_prompt:
            return metric
    encoders = {metric.encoder for metric in metrics}
    return next(m for m in METRICS.values() if m.encoder in encoders and not m.against_prompt)


def _describe_chain(chain: Chain) -> dict[str, Any]:
    return {
        "name": chain.name,
        "path": chain.path,
        "strategy": chain.strategy,
        "strategy_args": list(chain.strategy_args),
        "label": chain.label,
        "seed": chain.seed,
        "order_seed": chain.order_seed,
        "base": {"name": chain.base.name, "hash": chain.base_hash},
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
    numbers = score_matrix(matrix, sum(base) / len(base))
    return {
        "matrix": [[none_if_nan(v) for v in row] for row in matrix.tolist()],
        "base": list(base),
        "summary": numbers.to_json(),
    }


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
            raise ScoringError(
                f"{metric.name} needs the prompt of every generated image: in the PNG's metadata "
                "(key prompt), or one for all with --prompt."
            )
    return {
        m.name: score_files(m, caches[m.encoder], generated, references, prompts) for m in metrics
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
