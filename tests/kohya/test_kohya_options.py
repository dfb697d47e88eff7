"""kohya's options of the network, through whole runs: which modules are trained, and from where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_live import attach
from toy_runs import first_adapter

from lcp_plugin.errors import ConfigError
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import read_lora, write_lora

Train = Callable[..., Any]


# ------------------------------------------------------------------------------- which modules


def test_conv_dim_adapts_residual_blocks_at_ranks_of_their_own(train: Train) -> None:
    args = ["conv_dim=3", "conv_alpha=1.5"]
    adapter = first_adapter(train("run", tasks=(0,), lora_targets="transformer", network_args=args))
    wide = {n: f for n, f in adapter.items() if f.kernel == (3, 3)}
    assert any(".resnets." in name for name in wide)
    assert {(f.rank, f.alpha) for f in wide.values()} == {(3, 1.5)}
    assert {f.rank for f in adapter.values() if f.kernel is None} == {2}
    assert any(bool(f.up.any()) for f in wide.values())


def test_block_dims_and_alphas_hold_block_by_block(make_base: Callable[..., Any]) -> None:
    from lcp_plugin.config.network_args import block_index
    from lcp_plugin.formats.keys import to_sgm

    dims, alphas = [*range(1, 24)], [0.5 * i for i in range(1, 24)]
    args = (f"block_dims={','.join(map(str, dims))}", f"block_alphas={','.join(map(str, alphas))}")
    held = make_base(network_args=args)
    attach(held, network_args=args)
    for name, factors in held.adapted.trained().items():
        block = block_index(to_sgm(name.removeprefix("unet.")))
        assert (factors.rank, factors.alpha) == (dims[block], alphas[block]), name


def test_blocks_without_a_rate_are_not_adapted(make_base: Callable[..., Any]) -> None:
    args = ("mid_lr_weight=0,0,0", "up_lr_weight=.5,.5,.5,.5,.5,.5,.5,.5,.5")
    held = make_base(network_args=args)
    groups = attach(held, network_args=args)
    names = set(held.adapted.pair_of)
    assert names
    assert not any(name.startswith("unet.mid_block") for name in names)
    assert {group["lr"] for group in groups} <= {0.1, 0.05}
    assert 0.05 in {group["lr"] for group in groups}


def test_lora_plus_trains_b_faster(make_base: Callable[..., Any]) -> None:
    args = ("loraplus_lr_ratio=4",)
    held = make_base(network_args=args)
    groups = {group["lr"]: group["params"] for group in attach(held, network_args=args)}
    assert set(groups) == {0.1, 0.4}
    ups = {id(pair.up) for pair in held.adapted.pair_of.values()}
    assert {id(p) for p in groups[0.4]} == ups


def test_parts_have_rates_of_their_own_and_none_means_untrained(
    make_base: Callable[..., Any],
) -> None:
    given = {"network_train_unet_only": False, "unet_lr": 0.3}
    held = make_base(**given, text_encoder_lr=(0.1, 0.2))
    groups = attach(held, **given, text_encoder_lr=(0.1, 0.2))
    assert {group["lr"] for group in groups} == {0.1, 0.2, 0.3}
    held = make_base(**given, text_encoder_lr=(0.1, 0.0))
    attach(held, **given, text_encoder_lr=(0.1, 0.0))
    assert {n.split(".")[0] for n in held.adapted.pair_of} == {"unet", "text_encoder"}


def test_text_encoders_alone_are_trained(train: Train) -> None:
    run = train(
        "run",
        tasks=(0,),
        network_train_unet_only=False,
        network_train_text_encoder_only=True,
        cache_text_encoder_outputs=False,
    )
    assert {n.split(".")[0] for n in first_adapter(run)} == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    "options",
    [
        {"network_dropout": 0.5},
        {"network_args": ["rank_dropout=0.5"]},
        {"network_args": ["module_dropout=0.5"]},
    ],
    ids=["network", "rank", "module"],
)
def test_dropout_changes_what_is_learned_and_repeats(train: Train, options: dict[str, Any]) -> None:
    plain = first_adapter(train("plain", tasks=(0,)))
    first, again = (first_adapter(train(n, tasks=(0,), **options)) for n in ("one", "two"))
    assert any(not torch.equal(first[n].up, plain[n].up) for n in plain)
    assert all(torch.equal(first[n].up, again[n].up) for n in first)


# --------------------------------------------------------------------------------- how it starts


@pytest.mark.parametrize("strategy", ["merge_init", "recall"])
def test_network_module_means_kohyas_targets_and_start(train: Train, strategy: str) -> None:
    kohyas = {"network_module": "networks.lora", "learning_rate": 1e-12}
    run = train("run", tasks=(0,), strategy=strategy, **kohyas)
    adapter = first_adapter(run)
    assert any(name.endswith("proj_in") for name in adapter)
    for factors in adapter.values():  # kaiming_uniform, a = sqrt(5): uniform within 1 / sqrt(in)
        assert float(factors.down.abs().max()) <= 1 / math.sqrt(factors.down.shape[1]) + 1e-6
    assert run.store.folders()[0].lineage["strategy"]["args"] == ["init=kaiming"]


def test_a_given_start_wins_and_a_chain_may_differ_in_it(train: Train) -> None:
    first = train("first", tasks=(0,), network_module="networks.lora", strategy_args=["init=unit"])
    assert first.store.folders()[0].lineage["strategy"]["args"] == ["init=unit"]
    second = train("second", tasks=(1,), prev=str(first.store.root), lora_init="gaussian")
    assert second.store.folders()[0].lineage["strategy"]["args"] == ["init=gaussian"]


def test_no_update_is_larger_than_scale_weight_norms(train: Train) -> None:
    free = first_adapter(train("free", tasks=(0,)))
    held = first_adapter(train("held", tasks=(0,), scale_weight_norms=0.01))
    assert max(float(f.update().norm()) for f in free.values()) > 0.011
    assert max(float(f.update().norm()) for f in held.values()) <= 0.01 * (1 + 1e-4)


def test_network_weights_go_on_with_their_own_rank_and_alpha(train: Train, tmp_path: Path) -> None:
    parent = train("parent", tasks=(0,), network_dim=3, network_alpha=1.5, strategy="naive")
    file = parent.store.deliverable
    run = train("run", tasks=(1,), network_weights=str(file), learning_rate=1e-12)
    before, after = read_lora(file), read_lora(run.store.deliverable)
    assert before.total.keys() == after.total.keys()
    for name, entry in before.total.items():
        assert torch.allclose(entry.dense(), after.total[name].dense(), atol=1e-5)
    assert {(f.rank, f.scale) for f in first_adapter(run).values()} == {(3, 0.5)}
    assert after.metadata["ss_network_dim"] == "3"
    (source,) = json.loads(after.metadata["ss_lcp_parents"])
    assert source["hash"] == file_model_hash(file)


def test_what_network_weights_change_and_the_run_does_not_train_is_kept(
    train: Train, tmp_path: Path
) -> None:
    both = {"network_train_unet_only": False, "cache_text_encoder_outputs": False}
    parent = train("parent", tasks=(0,), **both)
    run = train("run", tasks=(1, 2), network_weights=str(parent.store.deliverable))
    before, after = read_lora(parent.store.deliverable), read_lora(run.store.deliverable)
    text = [name for name in before.total if name.startswith("text_encoder")]
    assert text
    for name in text:
        assert torch.allclose(before.total[name].dense(), after.total[name].dense(), atol=1e-6)
    assert not any(name.startswith("text_encoder") for name in first_adapter(run))


def test_dim_from_weights_trains_the_modules_of_the_file_only(train: Train, tmp_path: Path) -> None:
    parent = first_adapter(train("parent", tasks=(0,), network_dim=3))
    kept = parent.restrict([name for name in parent if name.endswith("to_q")])
    path = tmp_path / "queries.safetensors"
    write_lora(path, kept)
    run = train("run", tasks=(1, 2), network_weights=str(path), dim_from_weights=True)
    for folder in run.store.folders():
        adapter = folder.read_adapter()
        assert set(adapter) == set(kept)
        assert {f.rank for f in adapter.values()} == {3}


def test_network_weights_and_prev_exclude_each_other(train: Train) -> None:
    parent = train("parent", tasks=(0,))
    file = str(parent.store.deliverable)
    with pytest.raises(ConfigError, match="keep one"):
        train("run", tasks=(1,), network_weights=file, prev=file)
