"""What a sweep would run: lanes, leaders and followers, strategies with arguments of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from strategy_variants import FOUR

from lcp_plugin.errors import ConfigError
from lcp_plugin.sweep.plan import list_lanes, plan_runs


def test_a_lane_has_a_leader_and_the_others_follow_it(tmp_path):
    plan = plan_runs(
        Path("c.toml"), FOUR, ("independent", "joint"), list_lanes((None, 5), (0, 1)), tmp_path
    )
    assert [len(wave) for wave in plan.waves] == [8, 16]  # leaders and joint; followers
    names = {run.name for run in plan.runs}
    assert {"naive_seed0", "magmax_order5_seed1", "joint_order5_seed0"} <= names
    by_name = {run.name: run for run in plan.runs}
    assert by_name["naive_order5_seed1"].leader == ""
    assert by_name["magmax_order5_seed1"].leader == "naive_order5_seed1"
    assert by_name["joint_seed0"].leader == ""
    arguments = by_name["magmax_order5_seed1"].arguments
    assert arguments[:4] == ("--config", "c.toml", "--strategy", "magmax")
    assert "--order_seed" in arguments
    assert "--order_seed" not in by_name["naive_seed0"].arguments


def test_a_strategy_is_swept_with_arguments_of_its_own():
    strategies = ("naive", "recall", "recall of=merge_init images=4")
    plan = plan_runs(Path("c.toml"), strategies, (), list_lanes((None,), (0,)), Path("o"))
    by_name = {run.name: run.arguments for run in plan.runs}
    varied = " ".join(by_name["recall_of_merge_init_images_4_seed0"])
    assert (
        "--strategy recall --seed 0 --strategy_args of=merge_init images=4 --output_dir" in varied
    )
    assert "--strategy_args" not in by_name["recall_seed0"]


def test_merging_at_the_end_waits_for_the_independent_adapters():
    ceilings = ("independent", "merge_at_end")
    plan = plan_runs(Path("c.toml"), ("naive",), ceilings, list_lanes((None,), (0,)), Path("o"))
    assert [[run.strategy for run in wave] for wave in plan.waves] == [
        ["naive"],
        ["independent"],
        ["merge_at_end"],
    ]


def test_a_sweep_of_nothing_or_of_one_strategy_twice_is_refused(tmp_path):
    for strategies in ((), ("naive", "naive")):
        with pytest.raises(ConfigError, match="each once"):
            plan_runs(Path("c.toml"), strategies, (), list_lanes((None,), (0,)), tmp_path)
