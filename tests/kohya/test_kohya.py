"""The network_module for sd-scripts, driven by a stand-in that calls what sd-scripts calls."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_samples import OUT, fused, image, modules, random_adapter, same_factors
from torch import Tensor, nn

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
from lcp_plugin.formats.keys import to_sgm
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.hooks import Strategy
from lcp_plugin.kohya import ContinualNetwork, create_network, create_network_from_weights
from lcp_plugin.sdxl.load import hush_libraries
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.tasks import TaskRecord

# diffusers' scheduler under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BOOTS = TaskRecord(1, "boots", "object", "zwz boots")


@pytest.fixture(scope="module")
def toy() -> Any:
    from lcp_plugin.tiny.architecture import build_toy

    hush_libraries()
    return build_toy()


@pytest.fixture
def parent(tmp_path: Path, toy: Any) -> tuple[str, Adapter]:
    """Someone's LoRA on UNet and text encoders, rank 3, alpha 6."""
    adapter = random_adapter(
        toy, lambda n: ".attn" in n or ".self_attn" in n, lambda i: (3, 6.0), size=0.1
    )
    write_lora(tmp_path / "parent.safetensors", adapter, {"ss_output_name": "boots"})
    return str(tmp_path / "parent.safetensors"), adapter


class Trainer:
    """Calls the network as sd-scripts' train_network.py does, in its order."""

    def __init__(
        self,
        pipeline: Any,
        network_args: dict[str, str],
        unet_only: bool = True,
        network_weights: str | None = None,
        sgm: bool = False,
        dim_from_weights: bool = False,
        base_weights: tuple[str, ...] = (),
    ) -> None:
        self.pipeline = pipeline
        self.unet = sgm_view(pipeline.unet) if sgm else pipeline.unet
        self.text = [pipeline.text_encoder, pipeline.text_encoder_2]
        for model in (pipeline.unet, *self.text):
            model.requires_grad_(False)
        module = importlib.import_module("lcp_plugin.kohya")
        for file in base_weights:
            merged, weights = module.create_network_from_weights(
                1.0, file, None, self.text, self.unet, for_inference=True
            )
            merged.merge_to(self.text, self.unet, weights, torch.float32, "cpu")
        if dim_from_weights:
            network, _ = module.create_network_from_weights(
                1, network_weights, None, self.text, self.unet, **network_args
            )
        else:
            network = module.create_network(
                1.0, 4, 2.0, None, self.text, self.unet, neuron_dropout=None, **network_args
            )
        self.network: ContinualNetwork = network
        network.prepare_network(SimpleNamespace())
        network.set_multiplier(1.0)
        network.apply_to(self.text, self.unet, not unet_only, True)
        if network_weights:
            network.load_weights(network_weights)
        network.enable_gradient_checkpointing()
        groups, self.names = network.prepare_optimizer_params(None if unet_only else 1e-3, 1e-2, 1)
        self.optimizer = torch.optim.SGD(groups)
        network.prepare_grad_etc(self.text, self.unet)

    def train(self, steps: int = 2) -> Trainer:
        """A few steps of noise prediction on nothing in particular."""
        self.network.on_epoch_start(self.text, self.unet)
        for step in range(steps):
            self.network.on_step_start(self.text, self.unet)
            self.predict(step).square().mean().backward()
            nn.utils.clip_grad_norm_(self.network.get_trainable_params(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.network.eval()
        return self

    def predict(self, seed: int = 0) -> Tensor:
        return predict(self.pipeline, seed)

    def save(self, path: Path, dtype: torch.dtype | None = None) -> Path:
        metadata = {"ss_sd_model_name": "toy", "ss_steps": "2", "ss_network_dim": "4"}
        self.network.save_weights(str(path), dtype, metadata)
        return path


def predict(pipeline: Any, seed: int = 0) -> Tensor:
    """The UNet's prediction for a prompt that both text encoders read."""
    generator = torch.Generator().manual_seed(seed)
    unet = pipeline.unet
    ids = torch.randint(3, 40, (1, 8), generator=generator)
    one = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    two = pipeline.text_encoder_2(ids, output_hidden_states=True)
    states = torch.cat([one, two.hidden_states[-2]], dim=-1)
    size = unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=generator)
    conditions = {"text_embeds": two.text_embeds, "time_ids": torch.ones(1, 6)}
    weight = unet.conv_in.weight
    return unet(
        latents.to(weight),
        torch.tensor([300]),
        states.to(weight),
        added_cond_kwargs={k: v.to(weight) for k, v in conditions.items()},
    ).sample


def sgm_view(unet: nn.Module) -> nn.Module:
    """The UNet's layers under the names that sd-scripts' own class gives them."""
    root = nn.Module()
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        *path, last = to_sgm(name).split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


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


class Penalised(MergeInit):
    """Uses a hook that sd-scripts never calls."""

    name = "penalised"

    def before_backward(self, step: Any, loss: Tensor) -> Tensor:
        return loss * 2


def make(toy: Any, **network_args: str) -> ContinualNetwork:
    return create_network(1.0, 4, 2.0, None, [toy.text_encoder], toy.unet, None, **network_args)


def test_a_strategy_that_needs_step_hooks_is_refused(toy: Any) -> None:
    assert issubclass(Penalised, Strategy)
    with pytest.raises(StrategyError, match="never calls"):
        make(toy, strategy="test_kohya:Penalised")


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
