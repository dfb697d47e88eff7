"""A user's mistakes through the command line: one clear line, a status other than zero."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcp_plugin.cli import main

WriteConfig = Callable[..., Path]


@pytest.fixture
def complain(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """complain(*flags, **options): the error line of a run that fails before a model loads."""

    def run(*flags: str, loads: bool = False, tasks: Any = (0, 1), **options: Any) -> str:
        from lcp_plugin.run import opening

        if not loads:
            monkeypatch.setattr(
                opening, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded")
            )
        config = write_config("run", tasks=tasks, **options)
        capsys.readouterr()
        assert main(["--config", str(config), *flags]) != 0
        captured = capsys.readouterr().err
        assert "Traceback" not in captured
        lines = [x for x in captured.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1, captured
        return lines[0]

    return run


def test_a_missing_image_folder_is_named(complain: Callable[..., str], pictures: Path) -> None:
    shutil.rmtree(pictures / "disc1")
    assert "disc1" in complain()


def test_an_empty_image_folder_is_named(complain: Callable[..., str], pictures: Path) -> None:
    for path in (pictures / "disc1").iterdir():
        path.unlink()
    assert "disc1" in complain()


def test_an_unreadable_image_is_named(complain: Callable[..., str], pictures: Path) -> None:
    (pictures / "disc0" / "00.png").write_bytes(b"this is no picture")
    assert "00.png" in complain()


def test_a_truncated_image_is_named(complain: Callable[..., str], pictures: Path) -> None:
    path = pictures / "disc0" / "01.png"
    noise = Image.effect_noise((64, 64), 90)
    noise.save(path)
    path.write_bytes(path.read_bytes()[:-900])
    assert "01.png" in complain()


def test_no_task_is_refused(complain: Callable[..., str]) -> None:
    assert "task" in complain(tasks=())


def test_duplicate_names_are_refused(complain: Callable[..., str]) -> None:
    assert "disc0" in complain(tasks=(0, 0))


def test_rank_0_is_refused(complain: Callable[..., str]) -> None:
    line = complain(network_dim=0)
    assert "network_dim" in line
    assert "0" in line


def test_an_unknown_key_in_a_task_gets_did_you_mean(complain: Callable[..., str]) -> None:
    task = {
        "name": "a",
        "kind": "object",
        "concept": "sks",
        "image_dir": "disc0",
        "lerning_rate": 1,
    }
    line = complain(tasks=[task])
    assert "lerning_rate" in line
    assert "learning_rate" in line


def test_an_unknown_strategy_gets_did_you_mean(complain: Callable[..., str]) -> None:
    assert "did you mean 'magmax'" in complain(strategy="magmx")


def test_a_wrong_strategy_argument_is_refused(complain: Callable[..., str]) -> None:
    line = complain(strategy="magmax", strategy_args=["refrence=original"])
    assert "did you mean 'reference'" in line


def test_rank_1_is_refused_by_the_orthogonal_start(complain: Callable[..., str]) -> None:
    line = complain(strategy="merge_ortho_init", network_dim=1, loads=True)
    assert "network_dim >= 2" in line


def test_a_base_that_does_not_exist_is_refused(
    complain: Callable[..., str], tmp_path: Path
) -> None:
    line = complain(pretrained_model_name_or_path=str(tmp_path / "nothing.safetensors"))
    assert "nothing.safetensors" in line


def test_a_base_that_is_not_sdxl_is_refused(
    complain: Callable[..., str], toy_base: Path, tmp_path: Path
) -> None:
    import json

    other = tmp_path / "sd15"
    shutil.copytree(toy_base, other)
    index = json.loads((other / "model_index.json").read_text())
    del index["text_encoder_2"]
    index["_class_name"] = "StableDiffusionPipeline"
    (other / "model_index.json").write_text(json.dumps(index))
    assert "not SDXL" in complain(pretrained_model_name_or_path=str(other))


def test_a_lora_given_as_base_is_refused(complain: Callable[..., str], tmp_path: Path) -> None:
    import torch

    from lcp_plugin.formats.tensors import write_tensors

    path = tmp_path / "lora.safetensors"
    write_tensors(path, {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, {})
    assert "no SDXL checkpoint" in complain(pretrained_model_name_or_path=str(path))


def test_a_pickle_given_as_base_is_refused(complain: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert ".safetensors" in complain(pretrained_model_name_or_path=str(path))


def test_truncated_weights_of_the_base_are_refused(
    complain: Callable[..., str], toy_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cut"
    shutil.copytree(toy_base, other)
    weights = next((other / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert weights.name in complain(pretrained_model_name_or_path=str(other))


def test_a_truncated_parent_is_refused(
    complain: Callable[..., str], train: Callable[..., Any], tmp_path: Path
) -> None:
    first = train("first", tasks=(0,))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(first.store.deliverable.read_bytes()[:-100])
    told = complain(tasks=(1,), prev=str(path))
    assert "cut.safetensors holds" in told
    assert "truncated or damaged; download or copy it again" in told


def test_a_damaged_task_folder_is_refused(
    complain: Callable[..., str], train: Callable[..., Any]
) -> None:
    first = train("first", tasks=(0,))
    carry = first.store.folders()[-1].carry_file
    data = bytearray(carry.read_bytes())
    data[-5] ^= 1
    carry.write_bytes(bytes(data))
    assert "hash differs" in complain(tasks=(1,), prev=str(first.store.root))


def test_an_unfinished_parent_is_refused(complain: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    (folder / "01_disc0").mkdir(parents=True)
    assert "no complete task" in complain(prev=str(folder))


def test_an_unknown_optimizer_gets_did_you_mean(complain: Callable[..., str]) -> None:
    assert "AdamW" in complain(optimizer_type="AdamWW", loads=True)


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_a_folder_that_is_a_file_is_refused(
    complain: Callable[..., str], tmp_path: Path, key: str
) -> None:
    (tmp_path / "afile").write_text("x")
    assert f"{key} = " in complain(**{key: str(tmp_path / "afile")})


def test_a_wrong_vae_is_not_blamed_on_the_base(complain: Callable[..., str]) -> None:
    assert "vae 'None' does not exist" in complain(vae="None")


def test_a_dry_run_names_a_missing_parent(complain: Callable[..., str]) -> None:
    assert "nowhere.safetensors does not exist" in complain("--dry_run", prev="nowhere.safetensors")
