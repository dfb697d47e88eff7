"""A run is scored on the base that it was trained on, base weights included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quick_scores import FAST, score

from lcp_plugin.errors import ConfigError, LineageError
from lcp_plugin.evaluation import command
from lcp_plugin.evaluation.chains import base_stage, read_chain
from lcp_plugin.evaluation.pictures import Sampling, Stage, Studio, plan_pictures
from lcp_plugin.sdxl.base_weights import BaseSource, check_source

pytestmark = pytest.mark.usefixtures("quick_encoder")


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

    layers = find_layers({"unet": studio.stand_on(stage).pipeline.unet})
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def test_a_run_on_base_weights_is_scored_on_them(styled, toy_base, pictures, tmp_path):
    from lcp_plugin.formats.lora_file import read_lora

    run, file = styled
    chain = read_chain(run)
    stage, half = chain.stages[0], read_lora(file).total.weighted(0.5)
    plain = weights_of(Studio(str(toy_base), Sampling()), base_stage("0" * 64))
    found = weights_of(Studio(chain.base, Sampling()), stage)
    learned = stage.load().delta
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
    scheduler = Studio(base, Sampling()).live.pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert (float(scheduler.alphas_cumprod[-1]) < 1e-6) is zero
