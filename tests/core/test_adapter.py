"""Adapters: factors with their alpha and rank, and where fresh ones come from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_values import SHAPES, make_spec, random_adapter, random_factors, seeded

from lcp_plugin.adapter import Adapter, AdapterSpec, Factors
from lcp_plugin.errors import FileFormatError, NumericError, StrategyError


def test_an_update_uses_the_factors_own_alpha_and_rank() -> None:
    factors = random_factors((5, 7), rank=4, alpha=2.0)
    assert (factors.rank, factors.scale, factors.shape) == (4, 0.5, (5, 7))
    expected = 0.5 * factors.up.double() @ factors.down.double()
    assert torch.allclose(factors.update().double(), expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [1, 2.5, 64])
def test_alpha_travels_unchanged(alpha: float) -> None:
    factors = random_factors((3, 4), rank=2, alpha=alpha)
    adapter = Adapter({"unet.a": factors})
    for copy in (
        adapter.map_down(lambda name, down: down),
        adapter.restrict(["unet.a"]),
        adapter.without(["unet.b"]),
    ):
        assert copy["unet.a"].alpha == alpha
        assert isinstance(copy["unet.a"].alpha, float)


def test_factors_are_held_on_the_cpu_in_fp32_and_detached() -> None:
    down = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    factors = Factors(down, torch.randn(4, 2).half(), 2)
    assert factors.down.dtype is factors.up.dtype is torch.float32
    assert not factors.down.requires_grad


@pytest.mark.parametrize(
    ("up", "down"), [((4, 3), (2, 5)), ((4, 2, 1), (2, 5)), ((4, 2), (2, 5, 1, 1))]
)
def test_factors_that_do_not_multiply_are_an_error(
    up: tuple[int, ...], down: tuple[int, ...]
) -> None:
    with pytest.raises(FileFormatError, match="do not multiply"):
        Factors(torch.zeros(down), torch.zeros(up), 1.0)


def test_factors_cannot_be_reassigned() -> None:
    factors = random_factors((3, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        factors.alpha = 3.0  # type: ignore[misc]


def test_an_adapter_is_a_read_only_mapping_in_sorted_order() -> None:
    given = {"unet.b": random_factors((3, 4)), "unet.a": random_factors((3, 4))}
    adapter = Adapter(given)
    assert list(adapter) == ["unet.a", "unet.b"]
    given.clear()
    assert len(adapter) == 2
    with pytest.raises(TypeError):
        adapter["unet.c"] = random_factors((3, 4))  # type: ignore[index]


def test_restrict_and_without_split_an_adapter() -> None:
    adapter = random_adapter(1)
    assert list(adapter.restrict(["unet.a", "unet.unknown"])) == ["unet.a"]
    assert set(adapter.without(["unet.a", "unet.unknown"])) == set(SHAPES) - {"unet.a"}


@pytest.mark.parametrize("part", ["up", "down"])
def test_check_finite_names_the_module(part: str) -> None:
    tensors = {"up": torch.zeros(3, 2), "down": torch.zeros(2, 4)}
    tensors[part][0, 0] = torch.nan
    adapter = Adapter({"unet.a": Factors(**tensors, alpha=1.0)})
    with pytest.raises(NumericError, match=r"unet\.a"):
        adapter.check_finite()
    random_adapter(1).check_finite()


# ------------------------------------------------------------------------------------------ specs


def test_a_fresh_adapter_changes_nothing_and_has_the_specs_rank_and_alpha() -> None:
    adapter = make_spec(rank=3, alpha=5.0).gaussian()
    assert set(adapter) == set(SHAPES)
    for name, factors in adapter.items():
        assert factors.shape == SHAPES[name]
        assert (factors.rank, factors.alpha) == (3, 5.0)
        assert not factors.up.any()
        assert factors.down.any()


def test_ranks_and_alphas_by_module_beat_the_common_ones() -> None:
    spec = AdapterSpec(
        shapes=SHAPES, rank=2, alpha=2.0, seed=1, ranks={"unet.a": 3}, alphas={"unet.b": 7.0}
    )
    adapter = spec.gaussian()
    assert [adapter[n].rank for n in ("unet.a", "unet.b")] == [3, 2]
    assert [adapter[n].alpha for n in ("unet.a", "unet.b")] == [2.0, 7.0]


def test_a_rank_above_the_shape_is_kept_as_asked() -> None:
    assert make_spec(rank=9).gaussian()["unet.a"].rank == 9


def test_fresh_adapters_are_equal_for_one_seed_and_differ_between_seeds_and_modules() -> None:
    same = {"unet.a": (3, 4), "unet.b": (3, 4)}
    one, again = make_spec(1, shapes=same).gaussian(), make_spec(1, shapes=same).gaussian()
    other = make_spec(2, shapes=same).gaussian()
    assert torch.equal(one["unet.a"].down, again["unet.a"].down)
    assert not torch.equal(one["unet.a"].down, other["unet.a"].down)
    assert not torch.equal(one["unet.a"].down, one["unet.b"].down)


def test_a_modules_start_does_not_depend_on_which_other_modules_there_are() -> None:
    alone = make_spec(shapes={"unet.b": SHAPES["unet.b"]}).gaussian()
    assert torch.equal(alone["unet.b"].down, make_spec().gaussian()["unet.b"].down)


def test_fresh_adapters_leave_torchs_global_generator_alone() -> None:
    state = torch.get_rng_state()
    make_spec().fresh("kaiming")
    assert torch.equal(torch.get_rng_state(), state)


def test_convolutions_keep_their_kernel() -> None:
    spec = AdapterSpec({"unet.conv": (8, 36)}, 2, 2.0, 1, kernels={"unet.conv": (3, 3)})
    factors = spec.gaussian()["unet.conv"]
    assert factors.kernel == (3, 3)
    assert spec.gaussian().map_down(lambda n, d: d * 2)["unet.conv"].kernel == (3, 3)
    assert spec.orthogonal_to({"unet.conv": factors.down})["unet.conv"].kernel == (3, 3)


def test_orthogonal_starts_have_no_overlap_with_the_previous_columns() -> None:
    previous = {
        name: torch.randn(2, shape[1], generator=seeded(i))
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for name, factors in make_spec().orthogonal_to(previous).items():
        assert float((factors.down * previous[name]).sum(dim=0).abs().max()) < 1e-6
        assert torch.allclose(factors.down.norm(dim=0), torch.ones(SHAPES[name][1]))
        assert not factors.up.any()


def test_an_unknown_init_is_an_error() -> None:
    with pytest.raises(StrategyError, match="init = 'xavier'"):
        make_spec().fresh("xavier")
