"""The measures beyond the paper, on numbers worked by hand."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from lcp_plugin.evaluation import extras
from lcp_plugin.evaluation.chains import Chain, EvalTask
from lcp_plugin.evaluation.losses import (
    NOISES,
    TIMESTEPS,
    NoiseBank,
    Prober,
    make_bank,
    measure_losses,
    self_drift,
)
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.options import add_scoring_options
from lcp_plugin.evaluation.pictures import Sampling, Stage, Studio
from lcp_plugin.report.numbers import describe_extras, extra_values
from lcp_plugin.sdxl.noise import NoiseSchedule

METRIC = Metric("colour", "colour", "Colour")


def straight_schedule(prediction="epsilon"):
    """alpha_bar falls from 1 to 0 over 160 steps."""
    return NoiseSchedule(torch.linspace(1, 0, 160), prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_bank_has_every_image_with_every_timestep_and_noise(prediction):
    clean = torch.ones(2, 1, 3, 3) * torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    bank = make_bank(straight_schedule(prediction), clean, "a dog", seed=3)
    assert len(bank.noisy) == 2 * TIMESTEPS * NOISES
    # sixteen midpoints of 160 steps: 5, 15, ... 155, two noises each, once per image
    wanted = [t for t in range(5, 160, 10) for _ in range(NOISES)] * 2
    assert bank.timesteps.tolist() == wanted
    alpha = straight_schedule().alphas[bank.timesteps].view(-1, 1, 1, 1)
    images = clean.repeat_interleave(TIMESTEPS * NOISES, dim=0)
    noise = (bank.noisy - alpha.sqrt() * images) / (1 - alpha).sqrt()
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * images
    wanted_target = noise if prediction == "epsilon" else target
    torch.testing.assert_close(bank.target, wanted_target, atol=1e-5, rtol=1e-5)
    again = make_bank(straight_schedule(prediction), clean, "a dog", seed=3)
    assert torch.equal(again.noisy, bank.noisy)


def test_self_drift_is_measured_in_units_of_what_learning_moved():
    base, learned, now = torch.zeros(4), torch.full((4,), 2.0), torch.tensor([2.0, 2, 2, 6])
    assert self_drift(learned, learned, base) == 0
    assert self_drift(base, learned, base) == 1
    assert self_drift(now, learned, base) == pytest.approx(16 / 16)
    assert math.isnan(self_drift(now, base, base))


def two_tasks():
    tasks = tuple(
        EvalTask(i, n, "object", f"sks {n}", (f"a sks {n}",)) for i, n in enumerate("ab", 1)
    )
    stages = (Stage("after a", "w1"), Stage("after b", "w2"))
    return Chain("mine", "out/mine", "naive", "tiny", "f" * 64, tasks, stages)


class Told(Prober):
    """A model whose predictions are known by the state it stands on; the target is 1."""

    said: ClassVar[dict[str, float]] = {}

    def bank(self, task):
        return NoiseBank(torch.zeros(2), torch.ones(2), torch.zeros(2), "")

    def _run(self, stage, bank):
        return torch.full((2,), self.said[stage.weights.split("-")[0]])


def told(said, file=None):
    """A prober without a model."""
    studio = Studio("tiny", Sampling())
    prober = Told(studio, file=file)
    prober.said = said
    return prober


def test_the_loss_matrix_is_nan_before_a_task_is_learned():
    said = {"base": 0.0, "w1": 1.0, "w2": 3.0}

    prober = told(said)
    found = measure_losses(prober, two_tasks())
    np.testing.assert_allclose(found["losses"], [[0.0, 4.0], [math.nan, 4.0]])
    np.testing.assert_allclose(found["self_drift"], [[0.0, 4.0], [math.nan, 0.0]])
    np.testing.assert_allclose(found["base"], [1.0, 1.0])
    # two tasks under the base, two states on the first, one on the second
    assert prober.predicted == 5


def test_what_was_predicted_once_is_not_predicted_again(tmp_path):
    said, chain = {"base": 0.0, "w1": 1.0, "w2": 3.0, "w3": 4.0}, two_tasks()
    prober = told(said, tmp_path / "losses.json")
    first = measure_losses(prober, chain)
    other = replace(chain, stages=(chain.stages[0], Stage("after b", "w3")))
    measure_losses(prober, other)  # its first task and the base are shared
    assert prober.predicted == 7
    prober.save()
    again = told(said, tmp_path / "losses.json")
    second = measure_losses(again, chain)
    assert again.predicted == 0
    for key, values in first.items():
        np.testing.assert_array_equal(second[key], values)


def test_numbers_of_other_pictures_or_prompts_are_not_taken_for_these(tmp_path):
    prober, task = told({}), two_tasks().tasks[0]
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for i, path in enumerate(pictures):
        path.write_bytes(bytes([i]))
    others = [
        replace(task, train_prompt="a sketch of a"),
        replace(task, references=(pictures[0],)),
        replace(task, references=(pictures[1],)),
    ]
    keys = [prober.key(t) for t in (task, *others)]
    keys.append(Prober(Studio("tiny", Sampling(), vae="another"), prober.seed).key(task))
    keys.append(Prober(prober.studio, seed=1).key(task))
    assert len(set(keys)) == 6


def test_predictions_that_had_to_leave_memory_are_made_again():
    prober, chain = told({"base": 0.0, "w1": 1.0, "w2": 3.0}), two_tasks()
    prober.room = 0
    found = measure_losses(prober, chain)
    np.testing.assert_allclose(found["self_drift"], [[0.0, 4.0], [math.nan, 0.0]])
    assert prober.predicted > 5


class Known:
    """An evaluation whose pictures have known embeddings: (stage, task) -> rows."""

    def __init__(self, rows, references):
        self.rows, self.references, self.drawn = rows, references, []
        self.protocol = SimpleNamespace(sampling=SimpleNamespace(images=2))

    def cache(self, encoder):
        return self

    def pictures(self, stage, task):
        key = (stage.weights.split("-")[0], task.name)
        return [SimpleNamespace(path=(key, i)) for i in range(len(self.rows[key]))]

    def embed_files(self, paths):
        if isinstance(paths, str):
            return torch.tensor(self.references[paths])
        return torch.tensor([self.rows[key][i] for key, i in paths])

    def draw(self, chain, cells):
        self.drawn += [(chain.tasks[i].name, stage.weights) for i, stage in cells]

    def score(self, metric, stage, task):
        images = self.embed_files([p.path for p in self.pictures(stage, task)])
        return float(images.mean(0) @ self.embed_files(task.references).mean(0))


X, Y = [1.0, 0.0], [0.0, 1.0]


def test_bleed_scores_every_prompt_against_every_concept():
    chain = two_tasks()
    tasks = tuple(replace(t, references=r) for t, r in zip(chain.tasks, "xy", strict=True))
    chain = replace(chain, tasks=tasks)
    rows = {("w2", "a"): [X, X], ("w2", "b"): [X, Y], ("base", "a"): [Y, Y], ("base", "b"): [X, X]}
    known = Known(rows, {"x": [X], "y": [Y]})
    found = extras.measure_bleed(known, chain, METRIC)
    assert found["matrix"] == [[1, 0], [0.5, 0.5]]
    assert found["base"] == [[0, 1], [1, 0]]
    assert dict(extra_values("bleed", found))["off the diagonal"] == ".250"


def test_leakage_asks_without_the_rare_token_and_takes_the_base_off():
    chain = two_tasks()
    chain = replace(chain, tasks=tuple(replace(t, references="x") for t in chain.tasks))
    rows = {("w2", "a.class"): [X, Y], ("w2", "b.class"): [X, X]}
    rows |= {("base", "a.class"): [Y, Y], ("base", "b.class"): [X, X]}
    known = Known(rows, {"x": [X]})
    found = extras.measure_leakage(known, chain, METRIC)
    assert found == {"per_task": {"a": 0.5, "b": 0.0}, "mean": 0.25}
    assert ("a.class", "w2") in known.drawn


def test_drift_compares_pictures_of_the_same_noise():
    rows = {("base", "generic"): [X, Y], ("w1", "generic"): [X, Y], ("w2", "generic"): [Y, Y]}
    found = extras.measure_drift(Known(rows, {}), two_tasks(), METRIC)
    assert found == {"after": [0.0, 0.5]}


def test_diversity_is_taken_within_prompts():
    rows = {("w2", "a"): [X, Y, X, X], ("w2", "b"): [X, X]}
    rows |= {("base", "a"): [X, Y], ("base", "b"): [X, Y]}
    found = extras.measure_diversity(Known(rows, {}), two_tasks(), METRIC)
    assert found["final"] == {"a": 0.5, "b": 0.0}
    assert dict(extra_values("diversity", found)) == {"final": ".250", "base": "1.000"}


def test_every_measure_has_its_sentence_and_a_row_in_the_report():
    parser = argparse.ArgumentParser()
    add_scoring_options(parser)
    told = next(action for action in parser._actions if action.dest == "extras").help or ""
    offered = told.partition(": ")[2].split(", ")
    assert set(extras.ABOUT) == set(offered)
    assert set(offered) > {"bleed", "leakage", "drift", "diversity", "multi", "losses"}
    measured = {
        "drift": {"after": [0.1, 0.2]},
        "losses": {
            "normalised": [[1.0, 0.5], [None, 1.0]],
            "self_drift": [[0.0, 0.3], [None, 0.0]],
            "rank_correlation": {"loss_gain": 0.9, "self_drift": None},
        },
    }
    scores = {"extras": {"about": extras.ABOUT, "runs": {"mine": measured}}}
    run = SimpleNamespace(folder=SimpleNamespace(name="mine"), label="naive", tasks=())
    described = {d["title"]: d for d in describe_extras([scores], [run])}
    assert set(described) == {"Drift of everything else", "Without images"}
    assert described["Drift of everything else"]["rows"][0]["numbers"] == [
        ("after 1", ".100"),
        ("after 2", ".200"),
    ]
    numbers = dict(described["Without images"]["rows"][0]["numbers"])
    assert numbers["normalised, final"] == ".750"
    assert numbers["rank correlation of self-drift with the scores"] == "–"
