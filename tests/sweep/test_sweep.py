"""Sweeps: what is planned, what is shared, what is left alone, and the table at the end."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from lcp_plugin.errors import LcpError
from lcp_plugin.evaluation import evaluate
from lcp_plugin.evaluation.aggregate import (
    build_table,
    compare_strategies,
    matrices_csv,
    tell_differences,
)
from lcp_plugin.evaluation.metric_table import METRICS
from lcp_plugin.evaluation.options import add_scoring_options
from lcp_plugin.evaluation.tables import to_markdown
from lcp_plugin.formats.disk import write_json
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.sweep import running as sweep
from lcp_plugin.sweep.adoption import adopt_tasks
from lcp_plugin.sweep.command import sample_as_configured
from lcp_plugin.sweep.options import add_sweep_options
from lcp_plugin.sweep.plan import PlannedRun, SweepPlan
from lcp_plugin.sweep.running import execute_plan

ROOT = Path(__file__).resolve().parents[2]


def every_tensor(store):
    """What a run left: adapters, carries, strategy state, deliverable."""
    paths = [*sorted(store.root.glob("*/*.safetensors")), store.deliverable]
    return {
        (*(("delivered",) if p == store.deliverable else (p.parent.name, p.name)), key): tensor
        for p in paths
        for key, tensor in read_tensors(p).items()
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], (7, 2.5)),
        (["--steps", "3"], (3, 2.5)),
        (["--guidance", "0"], (7, 0)),
        (["--protocol", "p.toml"], (None, None)),  # which then decides
    ],
)
def test_a_comparison_samples_as_the_config_does(write_config, given, wanted):
    config = write_config("c", (0,), sample_steps=7, guidance_scale=2.5)
    parser = argparse.ArgumentParser()
    add_scoring_options(parser)
    add_sweep_options(parser, {"config": config})
    args = parser.parse_args(given)
    sample_as_configured(args, [])
    assert (args.steps, args.guidance) == wanted


# ------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("strategy", ["merge_ortho_init", "magmax"])
def test_a_run_that_takes_over_the_first_task_ends_with_the_same_tensors(
    train, write_config, strategy
):
    leader = train("leader", tasks=(0,), strategy="naive", samples_per_task=1, sample_steps=1)
    alone = train("alone", tasks=(0, 1), strategy=strategy, samples_per_task=1, sample_steps=1)
    path = write_config(
        "shared", tasks=(0, 1), strategy=strategy, samples_per_task=1, sample_steps=1
    )
    assert adopt_tasks(leader.store, ["--config", str(path)]) == 1
    shared = RunStore(path.parent / "out", "shared")
    assert [f.name for f in shared.folders()] == ["disc0"]

    from lcp_plugin.config.load import load_config
    from lcp_plugin.run.runner import execute

    execute(load_config(["--config", str(path)]))
    got, wanted = every_tensor(shared), every_tensor(alone.store)
    assert got.keys() == wanted.keys()
    assert not [key for key in got if not torch.equal(got[key], wanted[key])]
    assert (shared.root / "samples" / "00_base" / "disc0_0.png").is_file()


def test_a_strategy_that_begins_otherwise_shares_nothing(train, write_config):
    leader = train("leader", tasks=(0,), strategy="naive")
    path = write_config("other", (0, 1), strategy="merge_init", strategy_args=["init=kaiming"])
    assert adopt_tasks(leader.store, ["--config", str(path)]) == 0
    assert RunStore(path.parent / "out", "other").read_run() is None


def test_merging_at_the_end_is_formed_from_the_independent_adapters(train, write_config):
    leader = train("leader", tasks=(0, 1), strategy="independent")
    path = write_config("merged", (0, 1), strategy="merge_at_end")
    assert adopt_tasks(leader.store, ["--config", str(path)], count=9) == 2
    merged = RunStore(path.parent / "out", "merged").folders()[-1].read_carry().total
    name = next(iter(merged))
    parts = [f.read_adapter()[name].update() for f in leader.store.folders()]
    torch.testing.assert_close(merged[name].dense(), parts[0] + parts[1])


# ------------------------------------------------------------------------------ running


def planned(tmp_path, name, code, leader=""):
    """A run whose command is replaced by a few lines of Python."""
    return PlannedRun("naive", None, 0, tmp_path.as_posix(), name, ("-c", code), leader)


def test_a_finished_run_is_left_alone_and_a_failed_one_shows_its_log(tmp_path, monkeypatch):
    calls = []

    def train(arguments, log, threads, card):
        calls.append(arguments)
        log.write_text("first line\nthe reason\n")
        return 3

    monkeypatch.setattr(sweep, "train", train)
    write_json(tmp_path / "done" / "run.json", {"status": "finished"})
    assert sweep.execute_planned(planned(tmp_path, "done", "")) == "done"
    assert not calls
    with pytest.raises(LcpError, match="the reason"):
        sweep.execute_planned(planned(tmp_path, "fails", ""))
    assert calls == [("-c", "")]


def test_a_forked_run_ends_with_the_tensors_of_one_in_this_process(
    train, write_config, tmp_path, monkeypatch
):
    """And so does one that is started anew, where a system cannot fork."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    wanted = every_tensor(train("here", tasks=(0,)).store)
    log = tmp_path / "run.log"
    for name in ("forked", "anew"):
        path = write_config(name, (0,))
        if name == "anew":
            monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
        assert sweep.train(["--config", str(path)], log, threads=1) == 0, log.read_text()
        got = every_tensor(RunStore(tmp_path / "out", name))
        assert got.keys() == wanted.keys()
        assert not [key for key in got if not torch.equal(got[key], wanted[key])]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    printed = log.read_text("utf-8")
    assert "learned      disc0" in printed
    assert printed.index("forked [") < printed.index("anew [")


def test_a_forked_run_that_fails_tells_its_status_and_reason(tmp_path):
    log = tmp_path / "run.log"
    assert sweep.train(["--config", str(tmp_path / "missing.toml")], log, threads=1) == 2
    assert "missing.toml" in log.read_text("utf-8")


def test_runs_at_a_time_are_a_number_from_one(capsys):
    parser = argparse.ArgumentParser()
    add_sweep_options(parser, {"config": Path("c.toml")})
    assert parser.parse_args(["--jobs", "3"]).parallel == 3
    assert parser.parse_args(["--parallel", "2"]).parallel == 2
    for text in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--jobs", text])
    assert "wanted a whole number, 1 or more" in capsys.readouterr().err


def test_only_as_many_runs_as_asked_for_run_at_once_on_their_share_of_the_cores(
    tmp_path, monkeypatch
):
    now, most, threads = [], [], []

    def execute(run, share, card):
        now.append(run.name)
        most.append(len(now))
        threads.append(share)
        barrier.wait(timeout=60)  # passes only if two runs are here
        now.remove(run.name)

    barrier = threading.Barrier(2)
    monkeypatch.setattr(sweep, "execute_planned", execute)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 4)
    wave = tuple(planned(tmp_path, name, "") for name in "abcd")
    execute_plan(SweepPlan((wave,)), parallel=2)
    assert max(most) == 2
    assert threads == [2] * 4


def test_waves_wait_for_each_other_and_skip_what_is_finished(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(sweep, "execute_planned", lambda run, *_: order.append(run.name))
    write_json(tmp_path / "b" / "run.json", {"status": "finished"})
    waves = (
        (planned(tmp_path, "a", ""), planned(tmp_path, "b", "")),
        (planned(tmp_path, "c", ""),),
    )
    execute_plan(SweepPlan(waves))
    assert order == ["a", "c"]


# ------------------------------------------------------------------------------ the table


def entry(strategy, seed, matrix, base=0.2):
    """A run as scores.json holds it."""
    count = len(matrix)
    return {
        "name": f"{strategy}{seed}", "strategy": strategy, "label": strategy, "seed": seed,
        "order_seed": None, "tasks": ["x", "y"][:count], "ceiling": False, "stages": [{}],
        "metrics": {"effnet": {"matrix": matrix, "base": [base] * count}},
    }  # fmt: skip


RUNS = [
    entry("naive", 0, [[0.8, 0.4], [None, 0.8]]),
    entry("naive", 1, [[0.6, 0.4], [None, 0.8]]),
    entry("magmax", 0, [[0.8, 0.7], [None, 0.7]]),
    entry("magmax", 1, [[0.6, 0.6], [None, 0.7]]),
]


def test_the_table_equals_the_hand_worked_means_over_runs():
    joint = {
        **entry("joint", 0, []), "ceiling": True,
        "metrics": {"effnet": {"final": [0.8, 0.9], "base": [0.2, 0.2], "average_score": 0.85}},
    }  # fmt: skip
    table = build_table([*RUNS, joint], METRICS["effnet"])
    text = to_markdown(table).splitlines()
    assert text[2].startswith("| base | .200 ± .000 | – |")
    # naive: S .6 and .6; F .2 and .1.  magmax: S .7 and .65; F .05 and 0
    assert text[3].startswith("| naive | <u>.600 ± .000</u> | <u>.150 ± .050</u> |")
    assert text[4].startswith("| magmax | **.675 ± .025** | **.025 ± .025** |")
    assert text[5].startswith("| joint (ceiling) | .850 | – |")


def test_strategies_are_compared_in_pairs_of_order_and_seed():
    found = compare_strategies(RUNS, [METRICS["effnet"]])
    forgetting = next(d for d in found if d["measure"] == "forgetting")
    assert (forgetting["a"], forgetting["b"], forgetting["pairs"]) == ("naive", "magmax", 2)
    # differences .15 and .1: all four resamples have means .15, .125, .125, .1
    assert forgetting["difference"] == pytest.approx(0.125)
    assert forgetting["low"] == pytest.approx(0.1, abs=0.003)
    assert forgetting["high"] == pytest.approx(0.15, abs=0.003)
    assert not compare_strategies(RUNS[:1] + RUNS[2:3], [METRICS["effnet"]])


def test_every_cell_is_written_for_other_tools():
    lines = matrices_csv(RUNS[:1], METRICS["effnet"]).splitlines()
    assert lines == [
        "run,task,after,score",
        "naive0,x,base,0.2",
        "naive0,y,base,0.2",
        "naive0,x,x,0.8",
        "naive0,x,y,0.4",
        "naive0,y,y,0.8",
    ]


def test_differences_and_rank_correlations_are_told_in_a_line_each():
    scores = {
        "differences": compare_strategies(RUNS, [METRICS["effnet"]]),
        "extras": {"runs": {"naive0": {"losses": {"rank_correlation": {"loss_gain": 0.5}}}}},
    }
    told = tell_differences(scores).splitlines()
    assert told[1].startswith("effnet F: naive - magmax = +0.125 [+0.1")
    assert told[1].endswith("(95%, 2 pairs)")
    assert told[-1] == "naive0: rank correlation of loss_gain with the image scores +0.50"


def assert_every_measure_was_taken(scores):
    """Of a run over a sequence all extras; of a ceiling what has a meaning without one."""
    found = scores["extras"]["runs"]["naive_seed3"]
    bleed = found["bleed"]["matrix"]
    diagonal = scores["runs"][0]["metrics"]["effnet"]["matrix"]
    assert bleed[0][0] == pytest.approx(diagonal[0][1])
    assert len(found["drift"]["after"]) == 2
    losses = found["losses"]
    assert losses["normalised"][0][0] == pytest.approx(1)  # the first task is shared
    assert losses["self_drift"][0][0] == 0
    assert losses["losses"][1][0] is None
    assert set(found["leakage"]["per_task"]) == {"disc0", "disc1"}
    assert len(found["multi"]["pairs"]) == 1
    shares = found["recognition"]["recognised"]
    assert all(0 <= share <= 1 for shown in shares.values() for share in shown)
    alone = scores["extras"]["runs"]["independent_seed3"]
    assert set(alone) == {"recognition"}  # nothing else has a meaning without a sequence


def test_one_command_trains_scores_and_reports(write_config, tmp_path, monkeypatch, capsys):
    """Two strategies and a ceiling on the toy base, with every extra measure."""
    from quick_scores import Thumbnail

    from lcp_plugin import cli

    trained = []

    def in_this_process(arguments, log, threads, card):
        log.write_text("")
        before = len(list((tmp_path / "comparison" / "runs").glob("*/*/lineage.json")))
        status = cli.main(list(arguments))
        after = len(list((tmp_path / "comparison" / "runs").glob("*/*/lineage.json")))
        trained.append(after - before)
        return status

    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: Thumbnail())
    monkeypatch.setattr(sweep, "train", in_this_process)
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import compare
    finally:
        sys.path.remove(str(ROOT / "tools"))
    moved = str(tmp_path / "moved")  # the images lie where the training option --data_root says
    config = write_config("ignored", (0, 1), samples_per_task=1, sample_steps=1, data_root=moved)
    output = tmp_path / "comparison"
    argv = ["--config", str(config), "--strategies", "naive", "merge_init", "--ceilings",
            "independent", "--seeds", "3", "--output", str(output), "--images", "2", "--steps",
            "1", "--prompts", "1", "--extras", "bleed", "leakage", "drift", "diversity", "multi",
            "losses", "recognition", "--max_train_steps", "2", "--parallel", "1"]  # fmt: skip
    assert compare.main(argv) != 0
    assert "set data_root" in capsys.readouterr().err
    assert not trained  # told before anything is trained
    assert compare.main([*argv, "--data_root", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    for words in ("| naive |", "| merge_init |", "| independent (ceiling) |", "report"):
        assert words in printed
    scores = json.loads((output / "scores.json").read_text("utf-8"))
    assert_every_measure_was_taken(scores)
    page = (output / "report.html").read_text("utf-8")
    assert "Figure 1:" in page
    assert "Figure 2:" in page
    figures = {path.parent.name for path in (output / "runs").glob("*/conflicts.json")}
    assert figures == {"naive_seed3", "merge_init_seed3"}
    assert len(json.loads((output / "losses.json").read_text("utf-8"))) > 4
    steps = [
        len(RunStore(output / "runs", f"{s}_seed3").folders()) for s in ("naive", "merge_init")
    ]
    assert steps == [2, 2]
    assert trained == [2, 1, 1]  # the first task by the leader alone
