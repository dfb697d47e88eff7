"""What several tests need of LoRA files: random factors, the toy's modules, fusing, images."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter, Factors, Kernel
from lcp_plugin.biases import Biases
from lcp_plugin.delta import Delta
from lcp_plugin.formats.keys import canonical, is_module
from lcp_plugin.formats.lora_file import portable_adapter, write_lora
from lcp_plugin.registry import create_strategy
from lcp_plugin.store.carries import deliverable_adapter
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task

Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "unet.up_blocks.0.upsamplers.0.conv"
TEXT_1 = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"


def factors(
    shape: tuple[int, int],
    rank: int,
    alpha: float,
    seed: int,
    kernel: Kernel | None = None,
    size: float = 1.0,
) -> Factors:
    """Random factors of a module of (out, in), convolutions flattened."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], generator=generator) * size
    up = torch.randn(shape[0], rank, generator=generator) * size
    return Factors(down, up, alpha, kernel)


def mixed_adapter() -> Adapter:
    """Five kinds of modules, ranks and alphas that differ, none of them a power of two apart."""
    return Adapter(
        {
            Q: factors((8, 6), 3, 1.5, 0),
            OUT: factors((6, 6), 2, 2.0, 1),
            CONV: factors((4, 36), 2, 7.0, 2, (3, 3)),
            TEXT_1: factors((5, 5), 4, 0.75, 3),
            TEXT_2: factors((20, 5), 1, 3.0, 4),
        }
    )


def same_factors(a: Adapter, b: Adapter) -> bool:
    """Bit for bit, alpha and kernel included."""
    return list(a) == list(b) and all(
        torch.equal(a[n].up, b[n].up)
        and torch.equal(a[n].down, b[n].down)
        and (a[n].alpha, a[n].kernel) == (b[n].alpha, b[n].kernel)
        for n in a
    )


def modules(pipeline: object) -> Iterator[tuple[str, nn.Module]]:
    """(our name, module) of everything in a pipeline that a LoRA can change."""
    for model in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipeline, model).named_modules():
            ours = canonical(f"{model}.{name}")
            if isinstance(module, nn.Linear | nn.Conv2d) and is_module(ours):
                yield ours, module


def random_adapter(
    pipeline: object,
    pick: Callable[[str], bool],
    rank_and_alpha: Callable[[int], tuple[int, float]],
    size: float = 0.2,
) -> Adapter:
    """Factors for all modules of a pipeline that `pick` names; ranks and alphas by their number."""
    chosen = {}
    picked = [(name, module) for name, module in modules(pipeline) if pick(name)]
    for i, (name, module) in enumerate(picked):
        weight: Tensor = module.weight  # type: ignore[assignment]
        kernel = (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else None
        rank, alpha = rank_and_alpha(i)
        shape = (weight.shape[0], weight[0].numel())
        chosen[name] = factors(shape, rank, alpha, i, kernel, size)
    return Adapter(chosen)


def fused(pipeline: object, delta: Delta) -> object:
    """A copy of a pipeline with W0 + D for its weights."""
    changed = copy.deepcopy(pipeline)
    done = set()
    for name, module in modules(changed):
        if name in delta:
            module.weight.data += delta[name].dense().reshape(module.weight.shape)
            done.add(name)
    assert done == set(delta)
    return changed


def image(pipeline: object, seed: int = 1) -> Tensor:
    """One image of two steps, (1, h, w, 3) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a photo of a sks dog",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return torch.from_numpy(result.images)


def load_tool(name: str) -> ModuleType:
    """A command line of tools/ as a module."""
    path = Path(__file__).parent.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_uneven_toy() -> object:
    """A toy whose text encoders differ in width, as SDXL's do: diffusers tells them apart by it."""
    from lcp_plugin.tiny.architecture import build_toy

    pipeline = build_toy()
    old = pipeline.text_encoder_2.config
    wide = type(old)(
        **{**old.to_dict(), "hidden_size": 24, "intermediate_size": 48, "projection_dim": 24}
    )
    sizes = {"cross_attention_dim": 16 + 24, "projection_class_embeddings_input_dim": 24 + 6 * 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder_2 = type(pipeline.text_encoder_2)(wide).eval()
        unet = type(pipeline.unet).from_config({**pipeline.unet.config, **sizes}).eval()
    pipeline.register_modules(text_encoder_2=text_encoder_2, unet=unet)
    return pipeline


def run_of(folder: Path, strategy_name: str) -> tuple[Path, list[Adapter]]:
    """Three tasks learned under a strategy, with the deliverable beside the run."""
    from lcp_plugin.store.carries import lineage_of

    store = RunStore(folder, "run")
    strategy = create_strategy(strategy_name, [])
    carry, updates = store.read_parent().carry, []
    for index, name in enumerate(("boot", "can", "teapot"), 1):
        task = Task(index, name, "object", f"sks {name}", ())
        trained = Adapter(
            {Q: factors((40, 30), 2, 1.0, index), OUT: factors((40, 40), 2, 1.0, -index)}
        )
        carry = strategy.end_task(task, carry, trained)
        facts = {
            "strategy": {"name": strategy_name, "args": []},
            "base": {"name": "toy", "hash": "ab"},
            "parent": {"hash": None, "source": None},
            "seed": 1,
            "data": {"images": 4},
            "training": {"steps": 10},
            "options": {"network_dim": 2},
            "versions": {"lcp_plugin": "0"},
            "session": {"id": "1", "started_at": "a", "finished_at": "b"},
        }
        store.save_task(task, trained, carry, strategy, facts)
        updates.append(trained)
    header = lineage_of(carry, strategy_name, [], "toy", "ab").to_metadata()
    write_lora(store.deliverable, portable_adapter(deliverable_adapter(carry)), header)
    return store.root, updates


def random_biases(pipeline: object, pick: Callable[[str], bool]) -> Biases:
    """Changes of the biases of all modules of a pipeline that have one and `pick` names."""
    found = [(n, m.bias) for n, m in modules(pipeline) if pick(n) and m.bias is not None]
    draw = torch.Generator().manual_seed(3)
    return Biases({n: torch.randn(len(bias), generator=draw) * 0.3 for n, bias in found})


def with_biases(pipeline: object, biases: Biases) -> object:
    """A copy of a pipeline with b0 + d for its biases."""
    changed = copy.deepcopy(pipeline)
    for name, module in modules(changed):
        if name in biases:
            module.bias.data += biases[name].to(module.bias.dtype)
    return changed
