"""CLIP's byte-pair vocabulary, truncated to 2,048 entries (the full one would cost 12.6 MB).

A byte-pair vocabulary may be cut anywhere: its first merges are complete in themselves, and rarer
words only fall into more pieces. Entries: 256 bytes, 256 bytes at a word's end, 1,534 merges,
start and end of text. `write_tokenizer` makes the files of `tokenizer/` from CLIP's
bpe_simple_vocab_16e6.txt.gz (MIT; shipped in the PyPI package open_clip_torch).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

VOCABULARY_SIZE = 2048
BOS_ID = VOCABULARY_SIZE - 2
EOS_ID = VOCABULARY_SIZE - 1
MAX_LENGTH = 77  # tokens, as in CLIP
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def tokenizer_dir() -> Path:
    """Folder with vocab.json, merges.txt and tokenizer_config.json, read by CLIPTokenizer."""
    return Path(__file__).resolve().parent / "tokenizer"


def byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order: printable bytes stand for
    themselves, the others for code points from 256 on (GPT-2's scheme)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def truncate_vocabulary(merge_lines: list[str], size: int) -> tuple[dict[str, int], list[str]]:
    """Entries and merges of the vocabulary cut to `size` entries, in the original order."""
    alphabet = byte_alphabet()
    merges = merge_lines[: size - 2 * len(alphabet) - len(SPECIAL)]
    words = [*alphabet, *(character + "</w>" for character in alphabet)]
    words += ["".join(merge.split()) for merge in merges]
    words += SPECIAL
    return {word: index for index, word in enumerate(words)}, merges


def write_tokenizer(source: Path, folder: Path, size: int = VOCABULARY_SIZE) -> None:
    """Write the truncated vocabulary of CLIP's `source` (bpe_simple_vocab_16e6.txt.gz)."""
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    vocabulary, merges = truncate_vocabulary(lines[1:], size)  # line 0 is a version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": MAX_LENGTH,
                "bos_token": SPECIAL[0],
                "eos_token": SPECIAL[1],
                "unk_token": SPECIAL[1],
                "pad_token": SPECIAL[1],
                "do_lower_case": True,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
