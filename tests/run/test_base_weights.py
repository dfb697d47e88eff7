"""base_weights through whole runs: they belong to the base and are never delivered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_live import predict, random_lora

from lcp_plugin.errors import LineageError
from lcp_plugin.formats.lora_file import read_lora

Train = Callable[..., Any]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_base_weights_belong_to_the_base_with_their_multiplier(
    make_base: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    plain = make_base(mixed_precision=precision)
    path = random_lora(plain, tmp_path / "style.safetensors")
    given = {"base_weights": (str(path),), "base_weights_multiplier": (0.5,)}
    moved = predict(make_base(mixed_precision=precision, **given))
    before = predict(plain)
    plain.adapted.set_base(read_lora(path).total.weighted(0.5), "branch")
    expected = predict(plain)
    assert float((expected - before).abs().max()) > 1e-2
    assert float((moved - expected).abs().max()) < (1e-4 if precision == "no" else 2e-2)


def test_base_weights_are_hashed_into_the_base_and_never_delivered(
    train: Train, make_base: Callable[..., Any], tmp_path: Path
) -> None:
    path = random_lora(make_base(), tmp_path / "style.safetensors")
    plain = train("plain", tasks=(0,))
    run = train("run", tasks=(0,), base_weights=[str(path)], learning_rate=1e-12)
    assert run.plan.base_id.hash != plain.plan.base_id.hash
    assert "style.safetensors" in run.plan.base_id.name
    delivered = read_lora(run.store.deliverable).total
    assert max(float(entry.dense().abs().max()) for entry in delivered.values()) < 1e-6
    with pytest.raises(LineageError, match="Chain runs on one base"):
        train("next", tasks=(1,), prev=str(run.store.root))
    chained = train("next2", tasks=(1,), prev=str(run.store.root), base_weights=[str(path)])
    assert chained.store.folders()[-1].index == 2
