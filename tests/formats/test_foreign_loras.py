"""LoRA files of other tools: what is read, by which formula, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lora_samples import CONV, OUT, TEXT_1, Q, factors, mixed_adapter, same_factors
from torch import Tensor

from lcp_plugin.adapter import Adapter
from lcp_plugin.errors import FileFormatError, NumericError
from lcp_plugin.formats.keys import kohya_name
from lcp_plugin.formats.lora_file import lora_tensors, read_lora, write_lora
from lcp_plugin.formats.lora_keys import write_key
from lcp_plugin.formats.tensors import write_tensors

# ---------------------------------------------------------------------------- other tools' files


def save(path: Path, module: str, parts: dict[str, Tensor]) -> Path:
    write_tensors(path, {f"{kohya_name(module)}.{part}": t for part, t in parts.items()})
    return path


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_missing_or_zero_alpha_means_the_rank(tmp_path: Path) -> None:
    parts = {"lora_down.weight": draw(3, 5), "lora_up.weight": draw(4, 3)}
    for extra in ({}, {"alpha": torch.tensor(0.0)}):
        file = read_lora(save(tmp_path / "a", Q, {**parts, **extra}))
        assert file.adapter[Q].alpha == 3.0


def test_kohyas_integer_alpha_is_read(tmp_path: Path) -> None:
    parts = {"lora_down.weight": draw(3, 5), "lora_up.weight": draw(4, 3)}
    file = read_lora(save(tmp_path / "a", Q, {**parts, "alpha": torch.tensor(16)}))
    assert file.adapter[Q].alpha == 16.0


def test_loha_is_an_elementwise_product_of_two_low_rank_matrices(tmp_path: Path) -> None:
    a1, b1, a2, b2 = draw(4, 2), draw(2, 5, seed=1), draw(4, 2, seed=2), draw(2, 5, seed=3)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    file = read_lora(save(tmp_path / "a", Q, {**parts, "alpha": torch.tensor(3.0)}))
    wanted = torch.empty(4, 5)
    for o in range(4):
        for i in range(5):
            wanted[o, i] = 3 / 2 * (a1[o] @ b1[:, i]) * (a2[o] @ b2[:, i])
    torch.testing.assert_close(file.delta[Q].dense(), wanted)
    assert len(file.adapter) == 0


def test_lokr_is_a_kronecker_product(tmp_path: Path) -> None:
    w1, a, b = draw(2, 3), draw(4, 2, seed=1), draw(2, 5, seed=2)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    got = read_lora(save(tmp_path / "a", Q, parts)).delta[Q].dense()
    w2 = a @ b
    assert got.shape == (8, 15)
    for i in range(8):
        for j in range(15):
            wanted = 0.5 * w1[i // 4, j // 5] * w2[i % 4, j % 5]
            assert got[i, j].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_two_full_lokr_factors_ignore_alpha(tmp_path: Path) -> None:
    parts = {"lokr_w1": draw(2, 3), "lokr_w2": draw(4, 5), "alpha": torch.tensor(64.0)}
    got = read_lora(save(tmp_path / "a", Q, parts)).delta[Q].dense()
    assert got[0, 0].item() == pytest.approx((draw(2, 3)[0, 0] * draw(4, 5)[0, 0]).item())


def test_a_full_difference_of_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    diff = draw(4, 2, 3, 3)
    entry = read_lora(save(tmp_path / "a", CONV, {"diff": diff})).delta[CONV]
    assert entry.kernel == (3, 3)
    assert torch.equal(entry.dense(), diff.reshape(4, 18))


@pytest.mark.parametrize("kind", ["full", "LoCon", "LoKr", "nothing else"])
def test_a_change_of_a_bias_is_read_beside_any_kind(tmp_path: Path, kind: str) -> None:
    beside = {
        "full": {"diff": draw(4, 2, 3, 3)},
        "LoCon": {"lora_down.weight": draw(3, 2, 3, 3), "lora_up.weight": draw(4, 3, 1, 1)},
        "LoKr": {"lokr_w1": draw(2, 2), "lokr_w2": draw(2, 1, 3, 3)},
        "nothing else": {},
    }[kind]
    file = read_lora(save(tmp_path / "a", CONV, {**beside, "diff_b": draw(4)}))
    assert list(file.biases) == [CONV]
    assert torch.equal(file.biases[CONV], draw(4))
    assert list(file.total) == ([CONV] if beside else [])


def test_a_tucker_core_is_multiplied_into_the_factors(tmp_path: Path) -> None:
    up, mid, down = draw(4, 2, 1, 1), draw(2, 2, 3, 3, seed=1), draw(2, 5, 1, 1, seed=2)
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    got = read_lora(save(tmp_path / "a", CONV, parts)).adapter[CONV]
    wanted = torch.zeros(4, 5, 3, 3)  # three convolutions in a row: down, mid, up
    for o, c, p, q in (
        (o, c, p, q) for o in range(4) for c in range(5) for p in (0, 1) for q in (0, 1)
    ):
        wanted[o, c] += up[o, p, 0, 0] * mid[p, q] * down[q, c, 0, 0]
    torch.testing.assert_close(got.update().reshape(4, 5, 3, 3), wanted)
    assert got.kernel == (3, 3)


def test_lycoris_own_modules_agree_with_our_formulas(tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris.functional")
    weight = torch.empty(8, 6, 3, 3)
    w1d, w1u, w2d, w2u, t1, t2 = lycoris.loha.weight_gen(weight, 2)
    for tensor in (w1u, w2u):
        tensor.normal_()
    theirs = lycoris.loha.make_weight_tucker(t1, w1d, w1u, t2, w2d, w2u, torch.tensor(0.5))
    parts = {"hada_w1_a": w1u, "hada_w1_b": w1d, "hada_w2_a": w2u, "hada_w2_b": w2d}
    parts |= {"hada_t1": t1, "hada_t2": t2, "alpha": torch.tensor(1.0)}
    ours = read_lora(save(tmp_path / "a", CONV, parts)).delta[CONV]
    torch.testing.assert_close(ours.dense().reshape(8, 6, 3, 3), theirs)
    w1, a, b, t = draw(2, 3), draw(2, 4), draw(2, 2), draw(2, 2, 3, 3)
    theirs = lycoris.lokr.kron_weight(w1, None, None, None, a, b, t, 0.5)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    ours = read_lora(save(tmp_path / "a", CONV, {**parts, "alpha": torch.tensor(1.0)})).delta[CONV]
    torch.testing.assert_close(ours.dense().reshape(8, 6, 3, 3), theirs)


def test_lora_and_full_modules_of_one_file_add_up_to_its_total(tmp_path: Path) -> None:
    tensors = lora_tensors(Adapter({Q: factors((4, 4), 2, 1.0, 0)}))
    tensors[f"{kohya_name(OUT)}.diff"] = draw(3, 3)
    write_tensors(tmp_path / "a", tensors)
    file = read_lora(tmp_path / "a")
    assert list(file.adapter) == [Q]
    assert list(file.delta) == [OUT]
    assert list(file.total) == sorted([Q, OUT])


# --------------------------------------------------------------------------------- what is refused


def lora_parts() -> dict[str, Tensor]:
    return {"lora_down.weight": draw(3, 5), "lora_up.weight": draw(4, 3)}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({**lora_parts(), "dora_scale": draw(1, 5)}, "DoRA"),
        ({**lora_parts(), "diff_b": draw(5)}, "changes 5 outputs, its weights have 4"),
        ({"diff": draw(4, 5), "diff_b": draw(7)}, "changes 7 outputs, its weights have 4"),
        ({"diff": draw(4, 5), "diff_b": draw(4, 1)}, "wanted one float for each output"),
        ({"dora_scale": draw(1, 5), **lora_parts(), "diff_b": draw(4)}, "DoRA"),
        ({**lora_parts(), "hada_w1_a": draw(4, 2)}, "mixes kinds"),
        ({"lora_down.weight": draw(3, 5)}, "lacks up"),
        ({"lora_down.weight": draw(3, 5), "lora_up.weight": draw(4, 2)}, "do not multiply"),
        ({"lora_down.weight": draw(3), "lora_up.weight": draw(4, 3)}, "do not fit"),
        ({**lora_parts(), "alpha": torch.ones(2)}, "no single number"),
        ({**lora_parts(), "alpha": torch.tensor(math.nan)}, "alpha"),
        ({"alpha": torch.tensor(1.0)}, "no factors"),
        (
            {"lora_down.weight": torch.ones(3, 5, dtype=torch.int8), "lora_up.weight": draw(4, 3)},
            "floats",
        ),
        ({"hada_w1_a": draw(4, 2), "hada_w1_b": draw(2, 5)}, "lacks hada_w2_a"),
        ({"lokr_w1": draw(2, 2)}, "lacks lokr_w2_a"),
        ({"lokr_w1": torch.zeros(20_000, 1), "lokr_w2": torch.zeros(20_000, 1)}, "do not fit"),
        ({"diff": draw(4)}, "do not fit"),
    ],
)
def test_modules_that_cannot_be_added_are_refused(
    tmp_path: Path, parts: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(FileFormatError, match=words) as caught:
        read_lora(save(tmp_path / "bad.safetensors", Q, parts))
    assert "bad.safetensors" in str(caught.value)


def test_unknown_keys_are_listed_and_counted(tmp_path: Path) -> None:
    tensors = lora_tensors(mixed_adapter())
    tensors |= {f"lora_unet_single_blocks_{i}_linear1.alpha": torch.tensor(1.0) for i in range(9)}
    write_tensors(tmp_path / "a", tensors)
    with pytest.raises(FileFormatError, match=r"single_blocks_0_linear1\.alpha.* and 4 more"):
        read_lora(tmp_path / "a")


def test_two_naming_schemes_in_one_file_are_refused(tmp_path: Path) -> None:
    first, second = (
        Adapter({Q: factors((4, 4), 2, 1.0, 0)}),
        Adapter({OUT: factors((4, 4), 2, 1.0, 1)}),
    )
    for other in ("kohya_blocks", "diffusers", "peft"):
        tensors = lora_tensors(first) | lora_tensors(second, layout=other)
        write_tensors(tmp_path / "a", tensors)
        with pytest.raises(FileFormatError, match="mixes naming schemes"):
            read_lora(tmp_path / "a")


def test_text_encoder_keys_fit_both_kohya_schemes(tmp_path: Path) -> None:
    for layout in ("kohya", "kohya_blocks"):
        write_lora(tmp_path / "a", mixed_adapter(), layout=layout)
        assert TEXT_1 in read_lora(tmp_path / "a").adapter


def test_one_module_under_two_spellings_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(Adapter({Q: factors((4, 4), 2, 1.0, 0)}), layout="diffusers")
    tensors[f"{Q}.lora.down.weight"] = draw(2, 4)
    write_tensors(tmp_path / "a", tensors)
    with pytest.raises(FileFormatError, match="twice"):
        read_lora(tmp_path / "a")


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    adapter = read_lora(tmp_path / "a.safetensors").adapter
    size = (tmp_path / "a.safetensors").stat().st_size
    with (tmp_path / "a.safetensors").open("r+b") as file:  # in place, as other tools may
        file.write(b"\0" * size)
    assert same_factors(adapter, mixed_adapter())


def test_nan_is_neither_read_nor_written(tmp_path: Path) -> None:
    parts = lora_parts()
    parts["lora_up.weight"][0, 0] = math.nan
    with pytest.raises(NumericError, match="NaN"):
        read_lora(save(tmp_path / "a", Q, parts))
    broken = Adapter({Q: factors((4, 4), 2, 1.0, 0)}).map_down(lambda _, a: a / 0 * 0)
    with pytest.raises(NumericError):
        write_lora(tmp_path / "b", broken)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.use_dora": true}']
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    tensors = lora_tensors(Adapter({Q: factors((4, 4), 2, 1.0, 0)}), layout="diffusers")
    write_tensors(tmp_path / "a", tensors, {"lora_adapter_metadata": text})
    with pytest.raises(FileFormatError, match="configuration|DoRA"):
        read_lora(tmp_path / "a")


def test_a_peft_configuration_of_a_dora_is_refused(tmp_path: Path) -> None:
    adapter = Adapter({Q: factors((4, 4), 2, 1.0, 0)})
    write_lora(tmp_path / "adapter_model.safetensors", adapter, layout="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    write_tensors(
        tmp_path / "adapter_model.safetensors",
        {write_key(Q, p, "peft"): draw(2, 2) for p in ("down", "up")},  # type: ignore[arg-type]
    )
    with pytest.raises(FileFormatError, match="DoRA"):
        read_lora(tmp_path)


def test_an_ambiguous_folder_asks_for_the_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", mixed_adapter())
    with pytest.raises(FileFormatError, match="holds a.safetensors and b.safetensors"):
        read_lora(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert same_factors(read_lora(tmp_path).adapter, mixed_adapter())
