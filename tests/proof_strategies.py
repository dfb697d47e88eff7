"""Proof that the hooks suffice: five published methods, each in at most 40 lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.delta import Delta, adapter_from_tensors, adapter_to_tensors
from lcp_plugin.hooks import Carry, Model, Parameters, Step, Strategy, TaskStart
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.strategies.naive import Naive
from lcp_plugin.tasks import Task


class CLora(MergeInit):
    """C-LoRA (arXiv 2304.06027): merge & init, plus weight * || |D_{t-1}| * U_t ||^2 per layer.

    U_t = scale B A, products entry by entry: what earlier tasks changed much may hardly change.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def before_backward(self, step: Step, loss: Tensor) -> Tensor:
        for name, (down, up) in step.parameters.items():
            learned = step.base_delta(name)  # (out, in)
            if learned is not None:
                update = step.scales[name] * up @ down  # (out, in)
                loss = loss + self.weight * (learned.abs() * update).square().sum()
        return loss


class OnlineEwc(Naive):
    """Online EWC (arXiv 1612.00796, 1805.06370) on factors that go on training.

    L + weight / 2 sum_i F_i (theta_i - theta*_i)^2;  F_t = decay F_{t-1} + diag E[grad^2].
    """

    def __init__(self, weight: float = 1.0, decay: float = 0.9) -> None:
        super().__init__()
        self.weight, self.decay = weight, decay
        self.state: dict[str, Tensor] = {}

    def before_backward(self, step: Step, loss: Tensor) -> Tensor:
        for key, value in named(step.parameters):
            if f"fisher/{key}" in self.state:
                fisher, anchor = (self.state[f"{p}/{key}"].to(value) for p in ("fisher", "anchor"))
                loss = loss + self.weight / 2 * (fisher * (value - anchor).square()).sum()
        return loss

    def after_training(self, model: Model) -> None:
        keys, values = zip(*named(model.parameters), strict=True)
        squares = [torch.zeros_like(value) for value in values]
        batches = list(model.batches())
        for i, batch in enumerate(batches):
            gradients = torch.autograd.grad(denoising_loss(model, batch, seed=i), values)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.square() / len(batches)
        for key, value, square in zip(keys, values, squares, strict=True):
            before = self.state.get(f"fisher/{key}", torch.zeros(())).to(square)
            self.state[f"fisher/{key}"] = (self.decay * before + square).cpu()
            self.state[f"anchor/{key}"] = value.detach().cpu().clone()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)


class SelfDistillation(MergeInit):
    """Learning without forgetting (arXiv 1606.09282): stay near what the carry predicts."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def before_backward(self, step: Step, loss: Tensor) -> Tensor:
        noisy = step.batch["noisy_latents"]
        teacher = step.predict(noisy, step.timesteps, step.batch, weights="carry")
        return loss + self.weight * (step.prediction - teacher).square().mean()


class Slao(Strategy):
    """SLAO (arXiv 2512.23017): one LoRA, merged after every task, orthogonal starts.

    Start: A = Q^T of QR(A_{t-1}^T), B = B_{t-1}, on W_0. Merge: A_m = A_t and
    B_m = B_m + (B_t - B_m) / sqrt(t). The model after a boundary is W_0 + scale B_m A_m.
    """

    starts_from_parent = False

    def __init__(self) -> None:
        self.last, self.merged = Adapter(), Adapter()

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        turned = self.last.map_down(lambda name, down: torch.linalg.qr(down.T).Q.T)
        start = Adapter({**spec.gaussian(), **turned.restrict(spec.shapes)})
        others = set(carry.total) - set(start)
        return TaskStart(base=carry.total.restrict(others), adapter=start)

    def end_task(self, task: Task, carry: Carry, trained: Adapter) -> Carry:
        share = (len(carry.tasks) + 1) ** -0.5
        merged = dict(trained)
        for name, factors in self.merged.restrict(trained).items():
            new = trained[name]
            up = factors.up + share * (new.up - factors.up)
            merged[name] = Factors(new.down, up, new.alpha, new.kernel)
        self.last, self.merged = trained, Adapter(merged)
        others = carry.total.restrict(set(carry.total) - set(trained))
        return carry.after(task, delta=others + Delta.of(self.merged))

    def state_dict(self) -> dict[str, Tensor]:
        tensors = adapter_to_tensors(self.last, "last/")
        return {**tensors, **adapter_to_tensors(self.merged, "merged/")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.last = adapter_from_tensors(state, "last/")
        self.merged = adapter_from_tensors(state, "merged/")


class FrozenA(MergeInit):
    """Frozen A (LoRA-FA, arXiv 2308.03303): only B trains, the row space is chosen at the start."""

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        return replace(super().begin_task(task, carry, spec), trainable=frozenset({"B"}))


def named(parameters: Parameters) -> Iterator[tuple[str, nn.Parameter]]:
    """`<module>.A | .B` -> factor."""
    for name, (down, up) in parameters.items():
        yield f"{name}.A", down
        yield f"{name}.B", up


def denoising_loss(model: Model, batch: Mapping[str, Tensor], seed: int) -> Tensor:
    """The denoising loss of one batch at timesteps drawn from `seed`."""
    latents, generator = batch["latents"], torch.Generator().manual_seed(seed)
    timesteps = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy, target = model.corrupt(latents, noise, timesteps)
    return (model.predict(noisy, timesteps, batch) - target).square().mean()
