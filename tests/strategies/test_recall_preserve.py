"""Recall with `preserve`: class words and everyday prompts stay as the base draws them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import run_and_kill
from toy_runs import assert_equal_tensors, read_all

from lcp_plugin.cli import main
from lcp_plugin.config.options import Options
from lcp_plugin.errors import StrategyError
from lcp_plugin.evaluation.extras import GENERIC
from lcp_plugin.hooks import Model, Rehearsal, Step
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.registry import create_strategy
from lcp_plugin.run.forecast import rehearsal_seconds
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.strategies.recall import Recall
from lcp_plugin.strategies.recall_prompts import EVERYDAY, class_prompts, everyday_prompts
from lcp_plugin.tasks import EVAL_PROMPTS, TaskRecord

Train = Callable[..., Any]
SHORT = ("images=2", "sample_steps=2")
PRESERVING = (*SHORT, "preserve=0.5")


def test_everyday_prompts_are_none_that_drift_or_a_task_is_measured_by() -> None:
    assert not set(EVERYDAY) & {*GENERIC, *EVAL_PROMPTS["object"], *EVAL_PROMPTS["style"]}
    assert everyday_prompts(0, 3) == list(EVERYDAY[:3])
    assert set(everyday_prompts(1, 3)).isdisjoint(everyday_prompts(2, 3))


def test_class_words_are_concepts_without_what_is_rare_in_them() -> None:
    robot = TaskRecord(1, "robot", "object", "sks robot")
    bear = TaskRecord(2, "bear", "object", "uwu stuffed animal")
    again = TaskRecord(3, "other", "object", "zwz robot")
    named = TaskRecord(4, "blobby", "object", "blobby")  # no class that the base knows
    foreign = TaskRecord(1, "my dog", "object", "my dog", facts={"source": "my dog.safetensors"})
    assert class_prompts([robot, bear, again, named, foreign]) == [
        "a photo of a robot",
        "a photo of a stuffed animal",
    ]
    ink = class_prompts([TaskRecord(1, "ink", "style", "Ink Wash")])
    assert "image of a house" in ink
    assert not [prompt for prompt in ink if "nk" in prompt]


def test_a_share_outside_of_the_batch_is_one_line() -> None:
    with pytest.raises(StrategyError, match=r"preserve = 1\.5; give a share from 0 to 1"):
        create_strategy("recall", ["preserve=1.5"])


def rehearsed(train: Train, name: str, **options: Any) -> dict[int, list[Rehearsal]]:
    """What a run rehearses, by task."""
    Watching.seen = {}
    train(name, strategy="test_recall_preserve:Watching", **options)
    return Watching.seen


class Watching(Recall):
    """Keeps what it rehearses, and under which weights it drew."""

    seen: dict[int, list[Rehearsal]]

    def before_training(self, model: Model) -> None:
        super().before_training(model)
        self.model = model

    def rehearse(self, step: Step) -> Rehearsal | None:
        found = super().rehearse(step)
        if found is not None:
            Watching.seen.setdefault(self.model.task.index, []).append(found)
        return found

    def after_training(self, model: Model) -> None:
        for row in self.preserved:
            for bank in row:
                states, rows = bank.latents[:4].float(), bank.of_prompt[:4]
                told = {key: value[rows] for key, value in bank.conditioning.items()}
                said = model.predict(states, bank.timesteps[:4], told, "base")
                torch.testing.assert_close(said, bank.predictions[:4].float(), atol=2e-3, rtol=2e-3)
        super().after_training(model)


def test_the_base_teaches_its_share_of_every_batch_from_the_first_task_on(train: Train) -> None:
    seen = rehearsed(
        train, "shares", strategy_args=(*PRESERVING, "weight=2", "batch=4"), max_train_steps=4
    )
    assert {index: len(found) for index, found in seen.items()} == {1: 4, 2: 4}
    for found in seen[1]:  # nothing was learned: the base's share alone, at its share of the weight
        assert (len(found.prompts), found.weight) == (2, 1.0)
        assert not [prompt for prompt in found.prompts if "sks" in prompt]
    for found in seen[2]:
        taught = [prompt for prompt in found.prompts if "sks0" in prompt]
        assert (len(taught), len(found.prompts), found.weight) == (2, 4, 2.0)
    prompts = {prompt for found in seen[1] for prompt in found.prompts}
    assert "a photo of a disc" in prompts
    assert prompts & set(EVERYDAY)


def test_the_batch_grows_with_the_tasks_where_each_is_to_have_its_part(train: Train) -> None:
    seen = rehearsed(
        train,
        "grows",
        tasks=(0, 1, 2),
        strategy_args=("images=2", "sample_steps=2", "per_task=3"),
        max_train_steps=2,
        train_batch_size=1,
    )
    assert {i: {len(f.prompts) for f in found} for i, found in seen.items()} == {2: {3}, 3: {6}}


def test_a_dry_run_counts_every_row_that_is_rehearsed() -> None:
    options = Options(strategy="recall", train_batch_size=2)
    costs = [
        rehearsal_seconds(replace(options, strategy_args=args), 300.0, 3, 48 * 48)[0]
        for args in ((), ("every=2",), ("batch=4",), ("per_task=2",))
    ]
    assert costs == pytest.approx([200.0, 100.0, 400.0, 300.0])


def test_nothing_changes_without_a_share(train: Train) -> None:
    plain = train("plain", strategy="recall", strategy_args=SHORT)
    none = train("none", strategy="recall", strategy_args=(*SHORT, "preserve=0"))
    assert_equal_tensors(read_all(plain.store), read_all(none.store))


def test_what_is_preserved_moves_less(train: Train) -> None:
    """The base's part of the rehearsal at the end of the first task; three seeds."""
    for seed in (1, 2, 3):
        ends = []
        for weight in (0, 8):
            run = train(
                f"kept{weight}_{seed}",
                tasks=(0,),
                strategy="recall",
                strategy_args=(*PRESERVING, f"weight={weight}"),
                seed=seed,
                max_train_steps=12,
            )
            steps = read_steps(run.store.root / "logs" / "steps.jsonl")
            ends.append(sum(step["rehearsal"] for step in steps[-6:]))
        assert ends[1] < 0.7 * ends[0]


def test_text_encoders_that_were_trained_teach_as_the_base_s(train: Train) -> None:
    """The base's predictions belong to its own text encoders, whatever the chain did to them."""
    first = train(
        "first",
        tasks=(0,),
        strategy="merge_init",
        network_train_unet_only=False,
        cache_text_encoder_outputs=False,
        learning_rate=5e-2,
    )
    assert any(
        name.startswith("text_encoder") for name in first.store.folders()[-1].parent().carry.total
    )
    Taught.states = []
    run = train(
        "second",
        tasks=(1,),
        strategy="test_recall_preserve:Taught",
        strategy_args=(*PRESERVING, "of=merge_init"),
        prev=str(first.store.root),
        allow_strategy_change=True,
    )
    assert run.store.folders()
    untouched = train(
        "untouched",
        tasks=(1,),
        strategy="test_recall_preserve:Taught",
        strategy_args=(*PRESERVING, "of=merge_init"),
    )
    assert untouched.store.folders()
    chained, alone = Taught.states
    torch.testing.assert_close(chained, alone)


class Taught(Recall):
    """Keeps the base's drawing of one prompt."""

    states: list[torch.Tensor]

    def before_training(self, model: Model) -> None:
        super().before_training(model)
        noise = torch.randn(1, 4, *model.sizes()[0], generator=torch.Generator().manual_seed(0))
        dice = torch.Generator().manual_seed(0)
        drawn = model.draw("a photo of a disc", noise, 3, 1.5, dice, "base")
        Taught.states.append(drawn.predictions)


def test_two_tasks_of_a_run_are_two_chained_runs(train: Train) -> None:
    """Law 1."""
    options = {"strategy": "recall", "strategy_args": PRESERVING}
    whole = train("whole", **options)
    first = train("one", tasks=(0,), **options)
    second = train("two", tasks=(1,), prev=str(first.store.root), **options)
    assert_equal_tensors(read_all(whole.store), read_all(second.store))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_while_drawing_and_while_training_it_ends_as_undisturbed(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Law 2. The first drawings are the first task's: of its class word, of everyday prompts."""
    options = {"strategy": "recall", "strategy_args": PRESERVING, "max_train_steps": 4}
    status, events = run_and_kill(write_config("whole", **options), None)
    assert status == 0
    config = write_config("killed", **options)
    kept = tmp_path / "out" / "killed" / "state"
    drawn = set()
    for point in (events // 8, events // 8, events // 4):
        assert run_and_kill(config, point)[0] == -signal.SIGKILL
        drawn |= {path.name for path in kept.rglob("*.safetensors")}
    assert any("everyday" in name for name in drawn), drawn
    assert run_and_kill(config, None)[0] == 0
    stores = [RunStore(tmp_path / "out", name) for name in ("whole", "killed")]
    assert_equal_tensors(*(read_all(store) for store in stores))
    assert not kept.exists()


def test_a_dry_run_counts_what_is_drawn_of_the_base(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert Recall(images=8).count_images(3) == 8 * (0 + 1 + 2)
    assert Recall(images=8, preserve=0.1).count_images(3) == 8 * 3 + 2 * (1 + 2 + 3) + 8 * 3
    config = write_config("plan", (0,), strategy="recall", max_train_steps=1000)
    command = ["--config", str(config), "--dry_run"]
    assert main(command) == 0
    assert "for what is rehearsed" not in capsys.readouterr().out
    assert main([*command, "--strategy_args", "preserve=0.25"]) == 0
    assert "for what is rehearsed" in capsys.readouterr().out
