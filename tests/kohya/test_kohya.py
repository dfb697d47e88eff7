"""The network_module for sd-scripts, driven by a stand-in that calls what sd-scripts calls."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kohya_trainer import BOOTS, Trainer, make, predict
from lora_samples import (
    OUT,
    fused,
    image,
    modules,
    random_adapter,
    random_biases,
    same_factors,
    with_biases,
)
from plugin_samples import Penalised
from torch import nn

from lcp_plugin.adapter import Adapter
from lcp_plugin.delta import Delta
from lcp_plugin.errors import (
    ConfigError,
    FileFormatError,
    LineageError,
    NumericError,
    StrategyError,
)
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.hooks import Strategy
from lcp_plugin.kohya import create_network_from_weights

# ---------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("strategy", ["naive", "merge_init", "merge_ortho_init", "magmax"])
def test_a_chained_task_starts_from_what_the_parent_predicts_and_delivers_what_it_learned(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter], strategy: str
) -> None:
    file, adapter = parent
    pipeline = copy.deepcopy(toy)
    trainer = Trainer(pipeline, {"strategy": strategy, "prev": file, "seed": "1", "task": "can"})
    start = predict(fused(toy, Delta.of(adapter)))
    torch.testing.assert_close(trainer.predict(), start, rtol=1e-4, atol=1e-5)
    trainer.train()
    path = trainer.save(tmp_path / "out.safetensors")
    total = trainer.network.carry_after().total
    loaded = copy.deepcopy(toy)
    loaded.load_lora_weights(str(path))
    assert (image(loaded) - image(fused(toy, total))).abs().max() < 1e-4
    if strategy != "magmax":  # which selects: the boundary changes the model
        assert (image(loaded) - image(pipeline)).abs().max() < 1e-4
    assert (trainer.predict() - start).abs().max() > 1e-4  # it learned something


def test_what_is_saved_is_the_parent_plus_what_was_trained(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    file, adapter = parent
    trainer = Trainer(copy.deepcopy(toy), {"prev": file, "lora_targets": "attention"}).train()
    learned = trainer.network.trained()
    delivered = read_lora(trainer.save(tmp_path / "out.safetensors")).total
    assert set(delivered) == set(adapter)  # text encoders survive a UNet-only task
    for name in delivered:
        wanted = adapter[name].update().double()
        if name in learned:
            wanted = wanted + learned[name].update().double()
        torch.testing.assert_close(delivered[name].dense().double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_chain_of_files_knows_its_tasks(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    first = {"prev": parent[0], "task": "can", "concept": "twt can"}
    one = Trainer(copy.deepcopy(toy), first).train().save(tmp_path / "one.safetensors")
    second = {"prev": str(one), "task": "pot", "kind": "style"}
    two = Trainer(copy.deepcopy(toy), second).train().save(tmp_path / "two.safetensors")
    header = read_header(two).metadata
    lineage = Lineage.from_metadata(header)
    assert lineage is not None
    assert [(t.index, t.name) for t in lineage.tasks] == [(1, "boots"), (2, "can"), (3, "pot")]
    assert header["modelspec.trigger_phrase"] == "boots, twt can, pot"
    assert lineage.tasks[2].kind == "style"
    assert lineage.tasks[1].facts["steps"] == 2
    assert lineage.blocks_of(OUT) == (3, 4, 4)
    assert header["ss_network_dim"] != "4"  # kohya's argument is not what the file has


def test_saving_again_and_again_changes_nothing(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    for strategy in ("merge_ortho_init", "magmax"):
        arguments = {"strategy": strategy, "prev": parent[0]}
        trainer = Trainer(copy.deepcopy(toy), arguments).train()
        files = [trainer.save(tmp_path / f"{strategy}{i}.safetensors") for i in range(3)]
        assert len({file_model_hash(file) for file in files}) == 1


def test_text_encoders_are_trained_where_asked(tmp_path: Path, toy: Any) -> None:
    trainer = Trainer(copy.deepcopy(toy), {"seed": "1"}, unet_only=False).train()
    assert trainer.names == ["unet", "text_encoder", "text_encoder_2"]
    back = read_lora(trainer.save(tmp_path / "out.safetensors")).adapter
    trained = [name for name, f in back.items() if f.up.abs().max() > 0]
    assert any(name.startswith("text_encoder.") for name in trained)
    assert any(name.startswith("text_encoder_2.") for name in trained)
    alone = Trainer(copy.deepcopy(toy), {"seed": "1"})
    assert alone.names == ["unet"]


def test_sgm_and_diffusers_names_train_the_same(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    saved = []
    for sgm in (False, True):
        trainer = Trainer(copy.deepcopy(toy), {"prev": parent[0], "seed": "3"}, sgm=sgm).train()
        saved.append(read_lora(trainer.save(tmp_path / "out.safetensors")).adapter)
    assert same_factors(*saved)


def test_targets_are_kohyas_layers_or_the_attention_alone(toy: Any) -> None:
    def count(targets: str) -> int:
        trainer = Trainer(copy.deepcopy(toy), {"lora_targets": targets})
        return len(trainer.network.trained())

    linear = [
        name
        for name, module in modules(toy)
        if isinstance(module, nn.Linear) and ".attentions." in name
    ]
    assert count("transformer") == len(linear)
    assert count("attention") == len([name for name in linear if ".attn" in name])


# --------------------------------------------------------------------- kohya's own ways, mended


def test_network_weights_bring_their_own_alpha_and_rest_what_does_not_train(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    file, adapter = parent
    pipeline = copy.deepcopy(toy)
    trainer = Trainer(
        pipeline, {"lora_targets": "attention"}, network_weights=file, dim_from_weights=True
    )
    start = predict(fused(toy, Delta.of(adapter)))
    torch.testing.assert_close(trainer.predict(), start, rtol=1e-4, atol=1e-5)
    unet_part = adapter.restrict(n for n in adapter if n.startswith("unet."))
    assert same_factors(trainer.network.trained(), unet_part)
    back = read_lora(trainer.save(tmp_path / "out.safetensors")).total
    assert set(back) == set(adapter)
    for name in adapter:
        torch.testing.assert_close(back[name].dense(), adapter[name].update())


def test_network_weights_of_another_rank_are_refused(toy: Any, parent: tuple[str, Adapter]) -> None:
    with pytest.raises(LineageError, match="dim_from_weights"):
        Trainer(copy.deepcopy(toy), {}, network_weights=parent[0])


def test_base_weights_are_fused_and_not_delivered(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    file, adapter = parent
    trainer = Trainer(copy.deepcopy(toy), {"lora_targets": "attention"}, base_weights=(file,))
    start = predict(fused(toy, Delta.of(adapter)))
    torch.testing.assert_close(trainer.predict(), start, rtol=1e-4, atol=1e-5)
    back = read_lora(trainer.train().save(tmp_path / "out.safetensors"))
    assert all(name.startswith("unet.") for name in back.total)


def test_multiplier_zero_is_the_parent(toy: Any, parent: tuple[str, Adapter]) -> None:
    trainer = Trainer(copy.deepcopy(toy), {"prev": parent[0]})
    start = trainer.predict()
    trainer.train()
    trainer.network.set_multiplier(0.0)
    assert torch.equal(trainer.predict(), start)


def test_half_precision_weights_are_not_rounded_by_a_small_parent(toy: Any, tmp_path: Path) -> None:
    small = random_adapter(toy, lambda n: ".attn" in n, lambda i: (2, 2.0), size=1e-3)
    write_lora(tmp_path / "small.safetensors", small)
    pipeline = copy.deepcopy(toy)
    pipeline.unet.to(torch.bfloat16)
    before = {n: m.weight.clone() for n, m in modules(pipeline)}
    Trainer(pipeline, {"prev": str(tmp_path / "small.safetensors")})
    assert all(torch.equal(before[n], m.weight) for n, m in modules(pipeline))
    predict(pipeline)


def test_scaling_to_a_norm_keeps_directions(toy: Any) -> None:
    trainer = Trainer(copy.deepcopy(toy), {"lora_targets": "attention"}).train()
    before = trainer.network.trained()
    norms = {n: float(f.update().norm()) for n, f in before.items()}
    below, above = sorted(norms.values())[len(norms) // 2 :][:2]
    limit = (below + above) / 2
    scaled, mean, largest = trainer.network.apply_max_norm_regularization(limit, "cpu")
    assert scaled == sum(norm > limit for norm in norms.values())
    assert largest == pytest.approx(limit, rel=1e-5)
    assert mean <= limit
    for name, factors in trainer.network.trained().items():
        wanted = before[name].update() * min(1.0, limit / norms[name])
        torch.testing.assert_close(factors.update(), wanted, rtol=1e-4, atol=1e-9)


def test_dropouts_act_while_training_only(toy: Any, parent: tuple[str, Adapter]) -> None:
    arguments = {"rank_dropout": "0.5", "module_dropout": "0.2", "strategy": "naive"}
    trainer = Trainer(copy.deepcopy(toy), {**arguments, "prev": parent[0]})
    trainer.network.eval()
    assert torch.equal(trainer.predict(), trainer.predict())
    trainer.network.train()
    assert not torch.equal(trainer.predict(), trainer.predict())


def test_a_network_for_inference_is_the_file(toy: Any, parent: tuple[str, Adapter]) -> None:
    file, adapter = parent
    pipeline = copy.deepcopy(toy)
    text = [pipeline.text_encoder, pipeline.text_encoder_2]
    network, _ = create_network_from_weights(0.5, file, None, text, pipeline.unet, None, True)
    network.apply_to(text, pipeline.unet)
    wanted = predict(fused(toy, Delta.of(adapter).weighted(0.5)))
    torch.testing.assert_close(predict(pipeline), wanted, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- what is refused


def test_a_strategy_that_needs_step_hooks_is_refused(toy: Any) -> None:
    assert issubclass(Penalised, Strategy)
    with pytest.raises(StrategyError, match="never calls"):
        make(toy, strategy="plugin_samples:Penalised")


@pytest.mark.parametrize("strategy", ["recall", "plugin_samples:Rehearsing"])
def test_a_strategy_that_rehearses_is_refused_with_what_does_it_instead(
    toy: Any, strategy: str
) -> None:
    with pytest.raises(StrategyError, match="rehearses, which sd-scripts never") as refused:
        make(toy, strategy=strategy)
    assert "train_continual_sdxl.py" in str(refused.value)
    assert "lcp rehearse" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"strategy": "merge_innit"}, StrategyError),
        ({"conv_dim": "4"}, StrategyError),
        ({"prev": "missing.safetensors"}, LineageError),
        ({"lora_targets": "all"}, ConfigError),
    ],
)
def test_mistyped_arguments_are_one_line(
    toy: Any, arguments: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        make(toy, **arguments)
    assert "\n" not in str(caught.value)


def test_another_strategy_than_the_parents_must_be_asked_for(tmp_path: Path, toy: Any) -> None:
    first = Trainer(copy.deepcopy(toy), {"strategy": "magmax"}).train()
    file = str(first.save(tmp_path / "one.safetensors"))
    with pytest.raises(LineageError, match="allow_strategy_change=true"):
        make(toy, strategy="naive", prev=file)
    make(toy, strategy="naive", prev=file, allow_strategy_change="true")


def test_another_base_and_stale_text_caches_are_refused(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    network = make(toy, prev=parent[0])
    with pytest.raises(ConfigError, match="cache_text_encoder_outputs"):
        network.prepare_network(SimpleNamespace(cache_text_encoder_outputs=True))
    lineage = Lineage((BOOTS,), "merge_init", (), "sdxl", "ab" * 32, "delta")
    write_lora(tmp_path / "p.safetensors", parent[1], lineage.to_metadata())
    toy.save_pretrained(str(tmp_path / "toy"))
    network = make(toy, prev=str(tmp_path / "p.safetensors"))
    with pytest.raises(LineageError, match="was trained on base 'sdxl'"):
        network.prepare_network(
            SimpleNamespace(pretrained_model_name_or_path=str(tmp_path / "toy"))
        )


def test_a_parent_of_another_base_is_refused(tmp_path: Path, toy: Any) -> None:
    other = random_adapter(toy, lambda n: n == OUT, lambda i: (2, 2.0))
    wrong = Adapter({OUT.replace("mid_block", "up_blocks.7"): other[OUT]})
    write_lora(tmp_path / "p.safetensors", wrong)
    with pytest.raises(FileFormatError, match="is a block that SDXL does not have"):
        Trainer(copy.deepcopy(toy), {"prev": str(tmp_path / "p.safetensors")})


def test_nan_is_not_saved_and_pickles_are_not_written(tmp_path: Path, toy: Any) -> None:
    trainer = Trainer(copy.deepcopy(toy), {})
    with pytest.raises(ConfigError, match="safetensors"):
        trainer.save(tmp_path / "out.pt")
    with torch.no_grad():
        trainer.network.get_trainable_params()[0].fill_(float("nan"))
    with pytest.raises(NumericError):
        trainer.save(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_parents_biases_lie_under_the_training_and_in_what_is_saved(
    tmp_path: Path, toy: Any, parent: tuple[str, Adapter]
) -> None:
    adapter, file = parent[1], tmp_path / "biased.safetensors"
    biases = random_biases(toy, lambda n: n.endswith(("conv1", "to_out.0", "fc1")))
    write_lora(file, adapter, biases=biases)
    wanted = predict(with_biases(fused(toy, Delta.of(adapter)), biases))
    for given in ({"network_args": {"prev": str(file)}}, {"base_weights": (str(file),)}):
        more: dict[str, Any] = {"network_args": {"lora_targets": "attention"}, **given}
        trainer = Trainer(copy.deepcopy(toy), **more)
        torch.testing.assert_close(trainer.predict(), wanted, rtol=1e-4, atol=1e-5)
        saved = read_lora(trainer.train().save(tmp_path / "out.safetensors")).biases
        kept = biases if "network_args" in given else {}
        assert saved.keys() == kept.keys()
        assert all(torch.equal(saved[name], biases[name]) for name in saved)
