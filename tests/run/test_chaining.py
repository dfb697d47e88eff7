"""Chains: one run over n tasks is n chained runs, whatever the strategy and the parent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import (
    STRATEGIES,
    assert_equal_tensors,
    draw_pictures,
    draw_two,
    read_all,
    under,
    write_run,
)

from lcp_plugin.adapter import Adapter
from lcp_plugin.cli import main
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.hooks import Carry, Step, Strategy
from lcp_plugin.sdxl.adapted_unet import run_unet
from lcp_plugin.store.carries import hash_carry
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.strategies import BUILT_IN
from lcp_plugin.tasks import Task

Train = Callable[..., Any]
Trained = Callable[[str, str], RunStore]


@pytest.fixture(scope="module")
def trained(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """trained(strategy, name) -> a run on three tasks; each is trained once, when asked for.

    whole: all three. first, second, third: one task each, chained by task folder and run folder.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = draw_two(folder / "data")
    draw_pictures(data / "disc2", colour="gold")
    runs: dict[tuple[str, str], RunStore] = {}

    def learn(strategy: str, name: str, tasks: Sequence[int], **options: Any) -> RunStore:
        written = (folder / strategy, toy_base, data, name, tasks)
        written[0].mkdir(exist_ok=True)
        config = write_run(*written, **under(strategy), **options)
        assert main(["--config", str(config)]) == 0
        return RunStore(folder / strategy / "out", name)

    def find(strategy: str, name: str) -> RunStore:
        if (strategy, name) not in runs:
            if name == "whole":
                found = learn(strategy, name, (0, 1, 2))
            elif name == "first":
                found = learn(strategy, name, (0,))
            elif name == "second":
                prev = find(strategy, "first").folders()[-1].path
                found = learn(strategy, name, (1,), prev=str(prev))
            else:
                found = learn(strategy, name, (2,), prev=str(find(strategy, "second").root))
            runs[strategy, name] = found
        return runs[strategy, name]

    return find


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chained_runs_equal_one_run_bit_for_bit(trained: Trained, strategy: str) -> None:
    whole, third = trained(strategy, "whole"), trained(strategy, "third")
    assert third.folders()[-1].index == 3
    assert_equal_tensors(read_all(whole), read_all(third))


def test_tasks_appended_to_a_finished_run_continue_it(train: Train) -> None:
    whole = train("whole", tasks=(0, 1, 2))
    train("run", tasks=(0, 1))
    longer = train("run", tasks=(0, 1, 2))
    assert_equal_tensors(read_all(whole.store), read_all(longer.store))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chain_on_the_deliverable_equals_a_chain_on_the_folder(
    train: Train, trained: Trained, strategy: str
) -> None:
    prev = trained(strategy, "second").deliverable
    by_file = train("third", tasks=(2,), **under(strategy), prev=str(prev))
    a, b = read_all(trained(strategy, "third")), read_all(by_file.store)
    for key in a:
        if key.startswith(("adapter", "deliverable")):
            assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("layout", ["kohya", "kohya_blocks", "diffusers", "peft"])
@pytest.mark.parametrize("strategy", ["naive", "merge_ortho_init"])
def test_a_run_chains_on_anyones_lora(
    train: Train, tmp_path: Path, layout: str, strategy: str
) -> None:
    from lcp_plugin.formats.lora_file import write_lora

    parent = train("parent", tasks=(0,), network_dim=3, network_alpha=1, strategy="naive")
    adapter = parent.store.folders()[-1].read_adapter()
    path = tmp_path / "theirs.safetensors"
    write_lora(path, adapter, {}, torch.float32, layout)
    run = train("run", tasks=(1,), strategy=strategy, prev=str(path))
    folder = run.store.folders()[-1]
    assert [r.name for r in folder.records] == ["theirs", "disc1"]
    assert folder.index == 2
    learned = folder.read_adapter()
    name = next(iter(learned))
    expected = (3, 1.0) if strategy == "naive" else (2, 2.0)  # alpha and rank travel with factors
    assert (learned[name].rank, learned[name].alpha) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_earlier_carries_are_rebuilt_bit_for_bit(trained: Trained, strategy: str) -> None:
    """Against the carries that chained runs kept, each its last one."""
    from lcp_plugin.store.carries import carry_to_tensors

    last = trained(strategy, "whole")
    assert not last.folders()[0].carry_file.exists()
    for name in ("first", "second", "third"):
        kept = trained(strategy, name).folders()[-1]
        rebuilt = last.carry_after(kept.index)
        assert_equal_tensors(carry_to_tensors(kept.read_carry()), carry_to_tensors(rebuilt))


def test_the_first_task_is_the_same_under_all_strategies(trained: Trained) -> None:
    adapters = [trained(s, "first").folders()[0].path / "adapter.safetensors" for s in STRATEGIES]
    assert len({file_model_hash(path) for path in adapters}) == 1


@pytest.mark.parametrize("before", STRATEGIES)
def test_every_strategy_chains_on_every_other(train: Train, trained: Trained, before: str) -> None:
    prev = trained(before, "first").root
    for after in STRATEGIES:
        run = train(
            f"then_{after}",
            tasks=(1,),
            **under(after),
            prev=str(prev),
            allow_strategy_change=True,
        )
        (folder,) = run.store.folders()
        assert [r.name for r in folder.records] == ["disc0", "disc1"]


def compare_inputs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A strategy's hook that also looks whether its carry and its adapter stay as they were."""

    @wraps(hook)
    def call(self: Strategy, task: Task, carry: Carry, given: Any) -> Any:
        def hash_inputs() -> tuple[str, str]:
            adapter = given if isinstance(given, Adapter) else None
            return hash_carry(carry), hash_carry(Carry(adapter=adapter))

        before = hash_inputs()
        result = hook(self, task, carry, given)
        assert hash_inputs() == before
        return result

    return call


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chained_task_starts_at_what_base_plus_carry_predicts_and_keeps_its_inputs(
    train: Train,
    trained: Trained,
    toy_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    """Laws 3 and 7 in a run.

    The first prediction is that of diffusers' own UNet with the parent's update in its weights.
    """
    from diffusers import UNet2DConditionModel

    seen: list[tuple[Any, ...]] = []

    def watch(self: Strategy, step: Step, loss: torch.Tensor) -> torch.Tensor:
        seen.append(
            (step.batch["noisy_latents"], step.timesteps, step.batch, step.prediction.detach())
        )
        return loss

    first = trained(strategy, "first")
    with monkeypatch.context() as watched:
        watched.setattr(Strategy, "before_backward", watch)
        for hook in ("begin_task", "end_task"):
            kind = BUILT_IN[strategy]
            watched.setattr(kind, hook, compare_inputs(getattr(kind, hook)))
        train("second", tasks=(1,), **under(strategy), prev=str(first.root), max_train_steps=1)
    latents, timesteps, batch, prediction = seen[0]
    unet = UNet2DConditionModel.from_pretrained(toy_base / "unet").eval()
    with torch.no_grad():
        before = run_unet(unet, latents, timesteps, batch, torch.float32)
        for name, entry in first.folders()[-1].read_carry().total.items():
            weight = unet.get_submodule(name.removeprefix("unet.")).weight
            weight += entry.dense().view_as(weight)
        wanted = run_unet(unet, latents, timesteps, batch, torch.float32)
    size = float(wanted.norm())
    assert float((before - wanted).norm()) / size > 1e-3  # what was learned shows
    assert float((prediction - wanted).norm()) / size < 1e-5
