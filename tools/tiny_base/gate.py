"""The gate: does the base paint what it is asked for?

A small convolutional classifier learns subject, colour and background from the world's scenes as
the autoencoder returns them (never from samples). It must be right on renders of held-out pairs
before it may judge samples of held-out prompts. Also measured: how far apart the text encoders hold
two rare words of one class.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tiny_base.grid import GUIDANCE, STEPS, sample_pictures
from tiny_base.muon import MuonAdamW
from tiny_base.precision import fast_autocast
from tiny_base.pretrain_unet import encode_captions
from tiny_base.pretrain_vae import reconstruct, to_tensor
from tiny_base.render import Sprites, draw_scene
from tiny_base.schedule import load_checkpoint, save_checkpoint
from tiny_base.wide import draw_pool
from tiny_base.world import (
    BACKGROUNDS,
    COLOURS,
    EMOJI,
    RESERVED_WORDS,
    SHAPES,
    Scene,
    describe_background,
    sample_scene,
)

SUBJECTS = (*SHAPES, *EMOJI)
HEADS = {"subject": SUBJECTS, "colour": tuple(COLOURS), "background": BACKGROUNDS}
Confusion = Mapping[str, Mapping[tuple[str, str], int]]  # head -> (wanted, found) -> count
UNKNOWN = -1  # label of a colour that a scene does not name
BATCH = 64
ROUNDS = ((16_000, 1_400), (14_000, 800), (14_000, 800))  # fresh renders and steps of each round
HELD_OUT = 1_000  # renders the classifier is examined on
logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """(n, 3, side, side) in -1 to 1 -> logits of all heads, side by side."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 192)
        layers: list[nn.Module] = []
        before = 3
        for level, width in enumerate(widths):
            for repeat in range(1 if level == 0 else 2):
                stride = 2 if level and repeat == 0 else 1
                layers += [
                    nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                before = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(2 * before, sum(len(names) for names in HEADS.values()))

    def forward(self, pictures: Tensor) -> Tensor:
        """Mean and maximum over the places, then one linear layer."""
        features = self.trunk(pictures)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        logits: Tensor = self.head(pooled)
        return logits


def split_heads(logits: Tensor) -> dict[str, Tensor]:
    """Logits of each head, (n, classes)."""
    parts = torch.split(logits.float(), [len(names) for names in HEADS.values()], dim=1)
    return dict(zip(HEADS, parts, strict=True))


def label_scenes(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers of each head, (n,)."""
    return {
        "subject": torch.tensor([SUBJECTS.index(s.subject) for s in scenes]),
        "colour": torch.tensor(
            [UNKNOWN if s.colour is None else HEADS["colour"].index(s.colour) for s in scenes]
        ),
        "background": torch.tensor([BACKGROUNDS.index(s.background) for s in scenes]),
    }


def train_classifier(
    model: Classifier, pictures: NDArray[np.uint8], scenes: Sequence[Scene], steps: int, seed: int
) -> None:
    """Train in place on pictures (n, side, side, 3) that the autoencoder returned."""
    model.train()
    optimiser = MuonAdamW(dict(model.named_parameters()), 0.02, 3e-3, 0.99, adamw_only=("head",))
    labels, criterion = label_scenes(scenes), nn.CrossEntropyLoss(ignore_index=UNKNOWN)
    for step in range(steps):
        rng = np.random.default_rng([seed, step, 5])
        chosen = rng.integers(len(pictures), size=BATCH)
        batch = to_tensor(pictures[chosen])
        batch = batch.flip(-1) if rng.random() < 0.5 else batch
        batch = batch.roll(tuple(int(k) for k in rng.integers(-2, 3, 2)), (2, 3))
        batch = batch + 0.03 * torch.from_numpy(rng.normal(size=batch.shape)).float()
        with fast_autocast():
            logits = split_heads(model(batch))
        losses = [criterion(logits[head], labels[head][chosen]) for head in HEADS]
        torch.stack(losses).nansum().backward()  # type: ignore[no-untyped-call]
        optimiser.step(min(1.0, (step + 1) / 30) * (1 - step / steps))
        if step % 100 == 0:
            logger.info(
                "classifier step %d %s", step, [round(float(x.detach()), 3) for x in losses]
            )
    model.eval()


@torch.no_grad()
def classify(model: Classifier, pictures: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Most probable class of each head, (n,), of a picture and its mirror image together."""
    parts = torch.split(to_tensor(pictures), 256)
    logits = torch.cat([model(part) + model(part.flip(-1)) for part in parts])
    return {head: scores.argmax(1) for head, scores in split_heads(logits).items()}


def score_pictures(
    model: Classifier, pictures: NDArray[np.uint8], scenes: Sequence[Scene]
) -> dict[str, Any]:
    """Share right of each head, and of shapes and emoji apart; how often what was read as what:
    {"confusion": {head: {(wanted, found): count}}}."""
    found, wanted = classify(model, pictures), label_scenes(scenes)
    scores: dict[str, Any] = {}
    for head in HEADS:
        known = wanted[head] != UNKNOWN
        scores[head] = _share(found[head][known] == wanted[head][known])
    shape = torch.tensor([scene.is_shape for scene in scenes])
    right = found["subject"] == wanted["subject"]
    scores["shape"], scores["emoji"] = _share(right[shape]), _share(right[~shape])
    scores["confusion"] = {
        head: Counter(
            (names[w], names[f])
            for f, w in zip(found[head].tolist(), wanted[head].tolist(), strict=True)
            if w != UNKNOWN
        )
        for head, names in HEADS.items()
    }
    return scores


def most_frequent_mistakes(confusion: Mapping[tuple[str, str], int], count: int = 12) -> list[str]:
    """The commonest confusions of one head, "square read as circle (11)"."""
    wrong = Counter({pair: n for pair, n in confusion.items() if pair[0] != pair[1]})
    return [f"{w} read as {f} ({n})" for (w, f), n in wrong.most_common(count)]


def write_confusion(parts: Mapping[str, Confusion], file: Path) -> None:
    """All confusion matrices as one CSV: head, wanted, found, and a count for each of `parts` (what
    was shown to the classifier); pairs that never occurred are left out."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["head", "wanted", "found", *parts])
        for head, names in HEADS.items():
            for pair in product(names, names):
                counts = [part[head].get(pair, 0) for part in parts.values()]
                if any(counts):
                    writer.writerow([head, *pair, *counts])


def plain_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A scene without texture and rare word: what the classifier is asked about."""
    while True:
        scene = sample_scene(rng, held_out)
        if scene.word is None:
            return replace(scene, texture=None)


def prompt_of(scene: Scene, rng: np.random.Generator) -> str:
    """A complete prompt for a plain scene."""
    words = [scene.colour, scene.subject] if scene.colour else [scene.subject]
    article = "an" if str(words[0])[0] in "aeio" else "a"
    noun = " ".join(str(word) for word in words)
    return f"{article} {noun} {describe_background(scene.background, rng)}"


def measure_samples(
    pipeline: Any, model: Classifier, count: int, seed: int
) -> tuple[dict[str, Any], NDArray[np.uint8], list[str]]:
    """Scores of `count` samples of held-out prompts; the samples and their prompts."""
    rng = np.random.default_rng([seed, 6])
    scenes = [plain_scene(rng, held_out=True) for _ in range(count)]
    prompts = [prompt_of(scene, rng) for scene in scenes]
    pictures = sample_pictures(pipeline, prompts, seed, batch=50, half=True)
    facts = {"count": count, "steps": STEPS, "guidance": GUIDANCE}
    return {**score_pictures(model, pictures, scenes), **facts}, pictures, prompts


@torch.no_grad()
def measure_rare_words(pipeline: Any, classes: Sequence[str]) -> dict[str, float]:
    """Mean cosine between "a photo of a X class" for two of the paper's rare words X: of the pooled
    state, and of the states that the UNet attends to at the rare word's own tokens."""
    pooled_cosines, token_cosines = [], []
    for name in classes:
        captions = [f"a photo of a {word} {name}" for word in RESERVED_WORDS]
        states, pooled = encode_captions(pipeline, captions)
        start = len(pipeline.tokenizer("a photo of a").input_ids) - 1
        words = []
        for word, state in zip(RESERVED_WORDS, states, strict=True):
            length = len(pipeline.tokenizer(word).input_ids) - 2
            words.append(state[start : start + length].mean(0))
        for first, second in combinations(range(len(captions)), 2):
            pooled_cosines.append(_cosine(pooled[first], pooled[second]))
            token_cosines.append(_cosine(words[first], words[second]))
    return {
        "pooled_mean": float(np.mean(pooled_cosines)),
        "pooled_max": float(np.max(pooled_cosines)),
        "word_tokens_mean": float(np.mean(token_cosines)),
    }


def prepare_classifier(vae: Any, sprites: Sprites, side: int, file: Path, seed: int) -> Classifier:
    """The classifier in `file`, after whatever rounds of training it still lacks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    done = 0
    if file.exists():
        weights, facts = load_checkpoint(file)
        model.load_state_dict(weights)
        done = facts["rounds"]
    for index, (renders, steps) in enumerate(ROUNDS[done:], start=done):
        first = seed + 2_000_003 + index
        drawn = draw_renders(vae, sprites, side, first, renders, held_out=False)
        train_classifier(model, *drawn, steps, seed + index)
        save_checkpoint(file, model.state_dict(), {"rounds": index + 1})
    return model.eval()


def draw_renders(
    vae: Any, sprites: Sprites, side: int, seed: int, count: int, held_out: bool
) -> tuple[NDArray[np.uint8], list[Scene]]:
    """Plain scenes drawn and passed through the autoencoder."""
    scenes = [plain_scene(np.random.default_rng([seed, i]), held_out) for i in range(count)]
    drawn = draw_pool(
        lambda rng: draw_scene(plain_scene(rng, held_out), sprites, side), seed, count
    )
    return reconstruct(vae, drawn), scenes


def run_gate(
    pipeline: Any, sprites: Sprites, classifier_file: Path, seed: int, samples: int
) -> tuple[dict[str, Any], NDArray[np.uint8], list[str]]:
    """All figures of the gate; the samples and their prompts."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    model = prepare_classifier(pipeline.vae, sprites, side, classifier_file, seed)
    renders, scenes = draw_renders(pipeline.vae, sprites, side, seed + 3_000_003, HELD_OUT, True)
    on_samples, shown, prompts = measure_samples(pipeline, model, samples, seed)
    result = {
        "classifier_on_held_out_renders": score_pictures(model, renders, scenes),
        "rare_words_cosine": measure_rare_words(pipeline, ("dog", "sneaker", "backpack", "teapot")),
        "samples": on_samples,
    }
    return result, shown, prompts


def _share(right: Tensor) -> float:
    return float(right.float().mean()) if len(right) else float("nan")


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.float(), second.float(), dim=0))
