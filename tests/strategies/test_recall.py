"""Recall: the carried model draws what it knows, and that is rehearsed beside the next task."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import run_and_kill
from toy_runs import assert_equal_tensors, read_all

from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Model
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.trajectory import draw_trajectory, spread_times
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.strategies.recall import Recall
from lcp_plugin.strategies.recall_prompts import SETTINGS, prompts_of
from lcp_plugin.tasks import EVAL_PROMPTS, TaskRecord

Train = Callable[..., Any]
SHORT = ("images=2", "sample_steps=2")


def test_the_teacher_s_trajectory_of_a_gaussian_is_its_own_exact_flow() -> None:
    """For x_0 ~ N(0, 1) the best prediction is sqrt(1 - a) x, and DDIM keeps the variance 1."""
    alphas = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
    noise = torch.randn(5000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    times = spread_times(100, 50, 5000, torch.Generator().manual_seed(1))
    assert times.shape == (50, 5000)
    assert (times.diff(dim=0) <= 0).all()
    assert (times[0] == 99).all()
    assert len(set(times[1].tolist())) > 1  # offsets of each image's own

    def predict(x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        return (1 - alphas[t]).sqrt().float().view(-1, 1, 1, 1) * x

    drawn = draw_trajectory(predict, noise, ({}, {}), (alphas, "epsilon"), times, 1.0)
    assert drawn.latents.shape == (50 * 5000, 1, 2, 2)
    assert drawn.timesteps.tolist() == times.flatten().tolist()
    last = drawn.latents[-5000:]
    assert float(last.std()) == pytest.approx(1.0, abs=0.05)  # 20,000 values: error below .02
    torch.testing.assert_close(drawn.predictions, predict(drawn.latents, drawn.timesteps, {}))


def test_guidance_of_one_asks_nothing_of_the_empty_prompt() -> None:
    asked = []

    def predict(x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        asked.append(c["who"])
        return x * 0.1

    alphas = torch.linspace(0.99, 0.1, 10, dtype=torch.float64)
    noise = torch.ones(1, 4, 2, 2)
    rows: tuple[Any, Any] = ({"who": "prompt"}, {"who": "empty"})
    times = torch.tensor([[9], [5], [1]])
    draw_trajectory(predict, noise, rows, (alphas, "v_prediction"), times, 1.0)
    assert asked == ["prompt"] * 3
    draw_trajectory(predict, noise, rows, (alphas, "v_prediction"), times, 2.0)
    assert asked.count("empty") == 2  # none behind the last state


class Both(Recall):
    """Draws two prompts together and the second of them alone, from the same noise."""

    drawn: dict[str, torch.Tensor]

    def before_training(self, model: Model) -> None:
        super().before_training(model)
        noise = torch.randn(2, 4, *model.sizes()[0], generator=torch.Generator().manual_seed(0))
        prompts = ["a photo of a disc", "a red sign"]
        for name, of, rows in [("both", prompts, [0, 1]), ("second", prompts[1], [1])]:
            dice = torch.Generator().manual_seed(0)
            states = model.draw(of, noise[rows], 1, 1.5, dice, "base")
            Both.drawn[name] = states.predictions[-1]


def test_images_of_two_prompts_are_drawn_together_as_each_alone(train: Train) -> None:
    Both.drawn = {}
    train("drawing", strategy="test_recall:Both", tasks=(0,))
    torch.testing.assert_close(Both.drawn["both"], Both.drawn["second"])


def test_settings_hold_no_prompt_of_the_evaluation() -> None:
    assert not {p for prompts in SETTINGS.values() for p in prompts} & {
        p for prompts in EVAL_PROMPTS.values() for p in prompts
    }


def test_prompts_are_the_captions_of_a_task_and_its_concept_elsewhere() -> None:
    record = TaskRecord(1, "toy", "object", "sks toy", train_prompt="a photo of sks toy")
    assert prompts_of(record, 2, 4, 0.0) == ["a photo of sks toy"] * 4
    mixed = prompts_of(record, 2, 4, 0.5)
    assert mixed[:2] == ["a photo of sks toy"] * 2
    assert all("sks toy" in p for p in mixed)
    assert set(mixed[2:]) != set(prompts_of(record, 3, 4, 0.5)[2:])  # others in the next task
    own = TaskRecord(1, "toy", "object", "sks toy", facts={"captions": ["a", "b", "c"]})
    assert prompts_of(own, 2, 3, 0.0) == ["a", "b", "c"]
    style = TaskRecord(1, "ink", "style", "ink", train_prompt="ink image of {class_name}")
    assert not [p for p in prompts_of(style, 2, 4, 0.0) if "{" in p]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["of=recall"], "rehearses twice"),
        (["of=joint"], "joins all tasks"),
        (["of=nothing"], "no strategy is called 'nothing'"),
        (["images=0"], "give at least 1"),
        (["settings=2"], "a share from 0 to 1"),
    ],
)
def test_what_recall_cannot_do_is_one_line(args: list[str], line: str) -> None:
    with pytest.raises(StrategyError, match=line):
        create_strategy("recall", args)


def test_arguments_of_the_other_strategy_follow_its_name() -> None:
    strategy = create_strategy("recall", ["of=merge_ortho_init mode=row_null"])
    assert isinstance(strategy, Recall)
    assert strategy.inner.name == "merge_ortho_init"


@pytest.mark.parametrize("of", ["naive", "merge_init", "plugin_samples:Distant"])
def test_what_crosses_the_boundary_is_the_other_strategy_s(train: Train, of: str) -> None:
    args = (f"of={of}", "weight=0", *SHORT)
    alone = train("alone", strategy=of)
    rehearsed = train("rehearsed", strategy="recall", strategy_args=args)
    # weight 0 adds nothing to the gradients: the same tensors, whatever was drawn beside them
    assert_equal_tensors(read_all(alone.store), read_all(rehearsed.store))


def test_rehearsing_keeps_the_predictions_for_an_earlier_task(train: Train) -> None:
    """The rehearsal's error at the end of task 2, with and without its weight; three seeds."""
    for seed in (1, 2, 3):
        ends = {}
        for weight in (0, 4):
            args = (f"weight={weight}", *SHORT)
            run = train(
                f"w{weight}_{seed}",
                strategy="recall",
                strategy_args=args,
                seed=seed,
                learning_rate=1e-2,
                max_train_steps=12,
            )
            steps = read_steps(run.store.root / "logs" / "steps.jsonl")
            first = [s for s in steps if s["task_index"] == 1]
            assert not any("rehearsal" in s for s in first)  # nothing there to rehearse
            second = [s["rehearsal"] for s in steps if s["task_index"] == 2]
            ends[weight] = sum(second[-6:])
        assert ends[4] < 0.7 * ends[0]


def test_every_second_step_rehearses_with_twice_the_weight(train: Train) -> None:
    run = train("every", strategy="recall", strategy_args=("every=2", *SHORT), max_train_steps=4)
    steps = read_steps(run.store.root / "logs" / "steps.jsonl")
    second = [s for s in steps if s["task_index"] == 2]
    assert ["rehearsal" in s for s in second] == [True, False, True, False]
    rehearsing = second[2]
    assert rehearsing["objective"] == pytest.approx(
        rehearsing["loss"] + 2 * rehearsing["rehearsal"], rel=1e-5
    )


def test_what_was_drawn_is_gone_when_its_task_is_complete(train: Train) -> None:
    run = train("gone", strategy="recall", strategy_args=SHORT)
    assert not (run.store.root / "state").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kill", ["draw 2", "step 3"])
def test_killed_while_drawing_or_training_it_ends_as_undisturbed_and_draws_once(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    stores = {}
    for name in ("undisturbed", "killed"):
        log = tmp_path / f"{name}.log"
        monkeypatch.setenv("RECALL_LOG", str(log))
        options = {"strategy": "plugin_samples:Counting", "strategy_args": SHORT}
        config = write_config(name, (0, 1), resume_every_n_steps=2, max_train_steps=4, **options)
        if name == "killed":
            with monkeypatch.context() as dying:
                dying.setenv("RECALL_KILL", kill.replace("draw 2", "draw 1"))
                assert run_and_kill(config, None)[0] == -signal.SIGKILL
        assert run_and_kill(config, None)[0] == 0
        draws = log.read_text().split().count("draw")
        assert draws == (2 if name == "killed" and kill.startswith("draw") else 1)
        stores[name] = RunStore(tmp_path / "out", name)
    assert_equal_tensors(read_all(stores["undisturbed"]), read_all(stores["killed"]))


def test_more_rows_than_the_task_s_batch_are_rehearsed_in_pieces(train: Train) -> None:
    run = train("pieces", tasks=(0,), strategy="plugin_samples:Noisy", train_batch_size=2)
    steps = read_steps(run.store.root / "logs" / "steps.jsonl")
    assert all(s["rehearsal"] > 0 for s in steps)


def test_a_dry_run_says_what_drawing_costs_and_its_share(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from lcp_plugin.cli import main

    config = write_config("plan", (0, 1), strategy="recall", max_train_steps=1000)
    assert main(["--config", str(config), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert "rehearsing" in plan
    assert "for what is rehearsed" in plan
    assert main(["--config", str(config), "--dry_run", "--strategy", "naive"]) == 0
    assert "for what is rehearsed" not in capsys.readouterr().out


def test_ten_tasks_of_sdxl_are_drawn_in_a_quarter_of_their_training_by_the_defaults() -> None:
    """By the estimates of `config.estimates`, 850 steps a task at 1024 px, the paper's number."""
    from lcp_plugin.config.estimates import drawing_seconds, estimate_seconds
    from lcp_plugin.config.options import Options

    options = Options(mixed_precision="bf16", strategy="recall", gradient_checkpointing=True)
    drawing = drawing_seconds(Recall(), options, 1024**2, 10)
    steps = 10 * 850 + 9 * 850  # the tasks' own, and as many that rehearse
    assert drawing < 0.25 * steps * estimate_seconds(options, 1024**2, 10)
