"""Files that are no encoder's, given as one: a line in our words, before an image is made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quick_scores import photo
from test_encoders import VISION, save_clip

from lcp_plugin.commands.front import main
from lcp_plugin.errors import FileFormatError
from lcp_plugin.evaluation.metrics import METRICS, NETWORKS, load_encoder
from lcp_plugin.formats.tensors import write_tensors
from lcp_plugin.tiny.vocabulary import tokenizer_dir

METRIC_OF = {metric.encoder: metric.name for metric in METRICS.values()}


def write_torch(path: Path, value: object) -> None:
    torch.save(value, path)


def cut(path: Path, other: str) -> None:
    write_torch(path, {"a": torch.zeros(64)})
    path.write_bytes(path.read_bytes()[: -len(other)])


JUNK: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "text": ("notes.txt", lambda p: p.write_text("some notes\nof mine"), "begins with 'some notes"),
    "empty": ("x.pth", lambda p: p.write_bytes(b""), "it is empty"),
    "page": ("model.bin", lambda p: p.write_text("<html>" * 9), "begins with '<html>"),
    "image": ("x.pth", lambda p: photo().save(p, "PNG"), "PNG"),
    "cut": ("x.pth", lambda p: cut(p, "x" * 90), "truncated or damaged PyTorch checkpoint"),
    "none": ("x.pth", lambda p: write_torch(p, {"epoch": 3}), "without a tensor in it"),
    "other": ("x.pth", lambda p: write_torch(p, {"a": torch.zeros(2)}), "(it lacks|missing)"),
    "short": ("x.safetensors", lambda p: p.write_bytes(b"\0" * 4), "is it complete"),
    "safe": ("x.safetensors", lambda p: write_tensors(p, {"a": torch.ones(2)}), "(lacks|missing)"),
    "absent": ("x.pth", lambda p: None, "x.pth does not exist"),
}


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one error line of a command that fails; torch's advice is not in it."""
    capsys.readouterr()
    assert main(argv) != 0
    err = capsys.readouterr().err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert "See docs/evaluation.md" in err
    assert not re.search(r"torch\.load|weights_only|miniz|Traceback", err)
    return line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photo().save(folder / "a.png")
    return folder


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize("encoder", NETWORKS)
def test_a_file_that_is_no_encoder_is_told_in_one_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], encoder: str, kind: str
) -> None:
    name, write, words = JUNK[kind]
    (tmp_path / "config.json").write_text("{}", "utf-8")
    write(tmp_path / name)
    folders = ["--generated", str(photos), "--references", str(photos)]
    given = ["--metrics", METRIC_OF[encoder], "--encoder", f"{encoder}={tmp_path / name}"]
    told = refuse(capsys, ["evaluate", *folders, *given, "--output", str(tmp_path / "scores")])
    assert re.search(words, told)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("encoder", ["clip", "dino", "dinov2"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "config.json is not valid JSON"),
        ("[1]", "config.json is no configuration of a network"),
        ('{"image_size": "a", "vision_config": 3}', "cannot be built from"),
    ],
)
def test_a_configuration_that_is_none_is_told(
    tmp_path: Path, encoder: str, text: str, words: str
) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(FileFormatError, match=words) as caught:
        load_encoder(encoder, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_of_other_shapes_are_told(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**VISION, num_attention_heads=2, image_size=32)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    wide = {**config, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(wide), "utf-8")
    with pytest.raises(FileFormatError, match="dino") as caught:
        load_encoder("dino", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        (None, "no vocab.json and no merges.txt"),
        ("junk", "is damaged"),
        ('{"a": "x"}', "is damaged"),
        ("theirs", "another network's"),
    ],
)
def test_a_clip_that_cannot_read_prompts_is_refused_where_prompts_are_compared(
    tmp_path: Path,
    photos: Path,
    vocabulary: str | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_clip(tmp_path)
    if vocabulary == "theirs":
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer_dir() / name, tmp_path / name)
    elif vocabulary is not None:
        (tmp_path / "vocab.json").write_text(vocabulary, "utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    folders = ["--generated", str(photos), "--references", str(photos), "--prompt", "a dog"]
    argv = ["evaluate", *folders, "--encoder", f"clip={tmp_path}", "--output", str(tmp_path / "o")]
    assert words in refuse(capsys, [*argv, "--metrics", "clip_t"])
    assert main([*argv, "--metrics", "clip_i"]) == 0
