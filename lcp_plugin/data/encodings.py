"""A task's images and captions encoded once, in memory and, where asked for, on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcp_plugin.config.options import Options
from lcp_plugin.data.caches import DiskCache, check_finite, make_key
from lcp_plugin.data.captions import CaptionTime, process_caption
from lcp_plugin.data.examples import Example
from lcp_plugin.data.images import Size
from lcp_plugin.data.rows import TEXT, centre_crop, latent_name, read_pixels

EncodeImages = Callable[[Tensor], Tensor]  # (b, 3, h, w) in [-1, 1], fp32 -> scaled latents
EncodePrompts = Callable[[Sequence[str]], Mapping[str, Tensor]]

_PROMPTS_AT_ONCE = 8


def static_caption(example: Example) -> str:
    """The caption as text encoders get it, without what is random."""
    settings = example.caption_settings.without_chance()
    return process_caption(example.caption, settings, random.Random(0), CaptionTime())


@dataclass(frozen=True)
class EncodingSettings:
    """How much is encoded at a time, and where it is kept beside memory."""

    images_at_once: int = 1
    latents_folder: Path | None = None
    texts_folder: Path | None = None

    @classmethod
    def of(cls, options: Options, cache_dir: Path | None) -> EncodingSettings:
        """What the options ask for; on disk only where there is a folder."""
        latents, texts = options.cache_latents_to_disk, options.cache_text_encoder_outputs_to_disk
        return cls(
            images_at_once=options.vae_batch_size,
            latents_folder=cache_dir / "latents" if cache_dir and latents else None,
            texts_folder=cache_dir / "text" if cache_dir and texts else None,
        )


class Encodings:
    """Latents by `rows.latent_name` and text-encoder outputs by caption, on the CPU."""

    def __init__(self, settings: EncodingSettings) -> None:
        self.latents: dict[str, Tensor] = {}
        self.texts: dict[str, dict[str, Tensor]] = {}
        self._images_at_once = settings.images_at_once
        self._latent_disk = DiskCache(settings.latents_folder)
        self._text_disk = DiskCache(settings.texts_folder)

    def encode_images(self, examples: Iterable[Example], encode: EncodeImages, key: str) -> None:
        """Latents of all images, mirrored ones too where they are asked for.

        `key` names the VAE. Raises NumericError for NaN, naming the image.
        """
        waiting: dict[str, tuple[Example, bool]] = {}
        for example in examples:
            for flipped in (False, True) if example.subset.flip_aug else (False,):
                name = latent_name(example, flipped)
                cached = self._latent_disk.load(make_key(key, name))
                if cached and set(cached) == {"latents"}:
                    self.latents[name] = cached["latents"]
                elif name not in self.latents:
                    waiting[name] = (example, flipped)
        groups: dict[Size, list[str]] = {}
        for name, (example, _) in waiting.items():
            groups.setdefault(example.placement.bucket, []).append(name)
        for names in groups.values():
            for start in range(0, len(names), self._images_at_once):
                chunk = names[start : start + self._images_at_once]
                self._encode_chunk({n: waiting[n] for n in chunk}, encode, key)

    def _encode_chunk(
        self, chunk: Mapping[str, tuple[Example, bool]], encode: EncodeImages, key: str
    ) -> None:
        pixels = [read_pixels(e, flipped, centre_crop(e))[0] for e, flipped in chunk.values()]
        latents = encode(torch.stack(pixels)).detach().to("cpu")
        for (name, (example, _)), latent in zip(chunk.items(), latents, strict=True):
            tensors = {"latents": latent.clone()}
            remedy = "the VAE overflows in half precision: use --no_half_vae or another VAE"
            check_finite(tensors, f"image {example.path}", remedy)
            self.latents[name] = tensors["latents"]
            self._latent_disk.store(make_key(key, name), tensors)

    def encode_captions(self, examples: Sequence[Example], encode: EncodePrompts, key: str) -> None:
        """Text-encoder outputs of all captions, and of the empty one where captions are dropped.

        `key` names the text encoders with what they carry. Raises NumericError for NaN.
        """
        wanted = dict.fromkeys(static_caption(e) for e in examples)
        if any(e.caption_settings.drops for e in examples):
            wanted[""] = None
        missing = []
        for caption in wanted:
            cached = self._text_disk.load(make_key(key, caption))
            if cached and set(cached) == set(TEXT):
                self.texts[caption] = cached
            elif caption not in self.texts:
                missing.append(caption)
        for start in range(0, len(missing), _PROMPTS_AT_ONCE):
            chunk = missing[start : start + _PROMPTS_AT_ONCE]
            encoded = {k: v.detach().to("cpu") for k, v in encode(chunk).items()}
            for row, caption in enumerate(chunk):
                tensors = {k: encoded[k][row].clone() for k in TEXT}
                remedy = "try --mixed_precision bf16 or no"
                check_finite(tensors, f"caption {caption!r}", remedy)
                self.texts[caption] = tensors
                self._text_disk.store(make_key(key, caption), tensors)
