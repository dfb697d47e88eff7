"""Texts as Windows' editors save them, with a byte order mark and CRLF, are read as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_texts import HEAD, TASK, fill_folder

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.config.prompts import read_prompts
from lcp_plugin.errors import DataError
from lcp_plugin.evaluation import command
from lcp_plugin.evaluation.protocols import Protocol
from lcp_plugin.run.dry_run import describe_run


def as_windows_does(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode("utf-8")


def read_both(folder: Path, name: str, text: str, *flags: str) -> tuple[RunConfig, RunConfig]:
    """What `flags` say with the file `name` as plain text, and as Windows' editors save it."""
    (folder / name).write_bytes(text.encode("utf-8"))
    plain = load_config(flags)
    (folder / name).write_bytes(as_windows_does(text))
    return plain, load_config(flags)


def choose(protocol: Path) -> Protocol:
    """As `lcp evaluate --protocol` does."""
    return command.choose_protocol(command.build_parser().parse_args(["--protocol", str(protocol)]))


@pytest.fixture(autouse=True)
def _dogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill_folder(tmp_path / "dogs")


def test_a_config_in_toml(tmp_path: Path) -> None:
    texts = 'metadata_description = """two\nlines"""\noutput_name = "Zoë"\n'
    plain, windows = read_both(tmp_path, "c.toml", HEAD + texts + TASK, "--config", "c.toml")
    assert windows == plain
    assert plain.options.metadata_description == "two\nlines"


def test_a_config_in_json(tmp_path: Path) -> None:
    table = {
        "pretrained_model_name_or_path": "tiny-sdxl",
        "output_name": "Zoë",
        "train_data_dir": "train",
    }
    fill_folder(tmp_path / "train" / "2_sks dog")
    text = json.dumps(table, indent=2, ensure_ascii=False)
    plain, windows = read_both(tmp_path, "c.json", text, "--config_file", "c.json")
    assert windows == plain
    assert plain.options.output_name == "Zoë"


def test_a_dataset_file(tmp_path: Path) -> None:
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'dogs'\n"
    flags = ["--pretrained_model_name_or_path", "tiny-sdxl", "--dataset_config", "d.toml"]
    plain, windows = read_both(tmp_path, "d.toml", text, *flags)
    assert windows == plain
    assert plain.tasks[0].datasets[0].resolution == (64, 64)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# samples\na dog\n--w 64 --h 64\n\na Zoë\n"),
        ("p.toml", "[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = 'a dog'\n"),
        ("p.json", '[\n"a dog --w 64",\n{"prompt": "a Zoë"}\n]\n'),
    ],
)
def test_prompts_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "c.toml").write_text(HEAD + TASK, encoding="utf-8")
    flags = ["--config", "c.toml", "--sample_prompts", name, "--sample_every_n_steps", "2"]
    plain, windows = read_both(tmp_path, name, text, *flags)  # the check of the config reads it
    assert windows == plain
    read = read_prompts(name)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read == read_prompts(name)
    assert (read[0].prompt, read[0].width) == ("a dog", 64)


def test_captions_by_metadata(tmp_path: Path) -> None:
    table = {str(i): {"caption": "Zoë in a park", "tags": "green"} for i in range(2)}
    (tmp_path / "m.json").write_bytes(as_windows_does(json.dumps(table, indent=1)))
    flags = ["--pretrained_model_name_or_path", "tiny-sdxl", "--train_data_dir", "dogs"]
    config = load_config([*flags, "--in_json", "m.json", "--resolution", "64"])
    assert "Zoë in a park, green" in describe_run(config, 64)


def test_a_protocol_and_the_prompt_list_that_it_names(tmp_path: Path) -> None:
    quoted = "prompts = [\n'a {0} {1} at sea',\n]\n"
    listed = f"Object Prompts\n{quoted}\nLive Subject Prompts\n{quoted}"
    (tmp_path / "list.txt").write_bytes(as_windows_does(listed))
    text = 'images = 3\nseed = 5\nprompt_list = "list.txt"\n'
    (tmp_path / "p.toml").write_bytes(as_windows_does(text))
    protocol = choose(tmp_path / "p.toml")
    assert (protocol.sampling.images, protocol.sampling.seed) == (3, 5)
    assert set(protocol.prompts["object"]) == {"a {concept} at sea"}


def test_a_prompt_list_of_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("Object Prompts 'Zoë'".encode("utf-16"))
    (tmp_path / "p.toml").write_text('prompt_list = "list.txt"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"list\.txt is not UTF-8 text; save it as UTF-8\."):
        choose(tmp_path / "p.toml")
