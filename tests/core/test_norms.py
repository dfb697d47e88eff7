"""Max-norm regularisation against the full product in float64."""

from __future__ import annotations

import pytest
import torch

from lcp_plugin.norms import limit_update_norm, update_norm

A = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
B = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))


def test_the_norm_is_that_of_the_full_update() -> None:
    expected = (0.5 * B.double() @ A.double()).norm().item()
    assert update_norm(A, B, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_a_large_update_is_scaled_down_to_the_limit_in_both_factors() -> None:
    a, b = A.clone(), B.clone()
    norm, changed = limit_update_norm(a, b, 0.5, 1.0)
    assert changed
    assert norm == 1.0
    assert (0.5 * b.double() @ a.double()).norm().item() == pytest.approx(1.0, rel=1e-5)
    root = (1.0 / (0.5 * B.double() @ A.double()).norm()).sqrt().item()
    torch.testing.assert_close(a, A * root)
    torch.testing.assert_close(b, B * root)


def test_a_small_update_stays_as_it_is() -> None:
    a, b = A.clone(), B.clone()
    norm, changed = limit_update_norm(a, b, 0.5, 1000.0)
    assert not changed
    assert norm < 1000
    assert torch.equal(a, A)
    assert torch.equal(b, B)


def test_a_fresh_adapter_has_no_norm() -> None:
    assert limit_update_norm(A.clone(), torch.zeros(7, 4), 1.0, 0.1) == (0.0, False)
