"""Which prompts and how many images a score is made of."""

from __future__ import annotations

import pytest
from quick_scores import ROOT
from told import assert_one_error

from lcp_plugin.commands import evaluate
from lcp_plugin.errors import ConfigError, DataError
from lcp_plugin.evaluation import command
from lcp_plugin.evaluation.chains import EvalTask
from lcp_plugin.evaluation.pictures import Sampling
from lcp_plugin.evaluation.protocols import Protocol, read_dreambooth_prompts, read_protocol

pytestmark = pytest.mark.usefixtures("quick_encoder")


def test_the_papers_protocol_is_the_default():
    args = command.build_parser().parse_args([])
    protocol = command.choose_protocol(args)
    assert protocol == Protocol(Sampling(images=8, steps=50, guidance=5.0, seed=42))


def test_shipped_protocols_are_five_by_eight_and_twenty_five_by_four(tmp_path):
    paper = read_protocol(ROOT / "configs" / "protocols" / "paper.toml", {})
    task = EvalTask(1, "dog", "object", "sks dog", ("mine",))
    asked = paper.apply(task)
    assert (len(asked.prompts), paper.sampling.images) == (5, 8)
    assert "a sks dog in a jail" in asked.prompts
    listed = {"object": ["x {concept}"] * 25, "live": ["y {concept}"] * 25}
    dreambooth = read_protocol(ROOT / "configs" / "protocols" / "dreambooth.toml", {}, listed)
    asked = dreambooth.apply(task)
    assert (len(asked.prompts), dreambooth.sampling.images) == (25, 4)
    assert asked.prompts[0] == "y sks dog"


def test_the_data_sets_own_prompts_are_read():
    path = ROOT.parent / "shared" / "data" / "dreambooth" / "dataset" / "prompts_and_classes.txt"
    if not path.is_file():
        pytest.skip("needs shared/data")
    lists = read_dreambooth_prompts(path)
    assert (len(lists["object"]), len(lists["live"])) == (25, 25)
    assert lists["object"][0] == "a {concept} in the jungle"
    assert "a {concept} wearing a red hat" in lists["live"]


def test_a_protocol_with_unknown_keys_is_refused(tmp_path):
    (tmp_path / "p.toml").write_text("imagse = 3\n")
    with pytest.raises(ConfigError, match="imagse"):
        read_protocol(tmp_path / "p.toml", {})
    (tmp_path / "q.toml").write_text('prompt_list = "not_there.txt"\n')
    with pytest.raises(DataError, match=r"not_there\.txt"):
        read_protocol(tmp_path / "q.toml", {})


@pytest.mark.parametrize(
    "line", ["images = 0", "steps = 0", "guidance = inf", f"seed = {2**63}", "seed = -1"]
)
def test_the_command_refuses_a_protocol_that_draws_nothing(tmp_path, capsys, line):
    (tmp_path / "p.toml").write_text(line + "\n")
    tasks = str(ROOT / "configs" / "quickstart.toml")
    argv = ["--base", "tiny-sdxl", "--tasks", tasks, "--protocol", str(tmp_path / "p.toml")]
    assert evaluate.main(argv) == 2
    told = capsys.readouterr().err
    assert_one_error(told)
    assert f"protocol {tmp_path / 'p.toml'}: " in told


def test_options_beat_the_protocol_file():
    file = ROOT / "configs" / "protocols" / "paper.toml"
    protocol = read_protocol(file, {"images": 2, "count": 1, "steps": None})
    assert (protocol.sampling.images, protocol.sampling.steps, protocol.count) == (2, 50, 1)
