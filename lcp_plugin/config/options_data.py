"""Options about images, captions, buckets and caches; kohya's names, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from lcp_plugin.config.fields import group

# what folders and files hold is fingerprinted by contents, so their paths are not "fixed"
_source = group("Dataset", per_task=True)
_caption = group("Captions", per_task=True)
_image = group("Images and buckets", per_task=True)
_cache = group("Caches", fixed=False)


@dataclass(frozen=True)
class DataOptions:
    """Where images and captions come from, and how they are read."""

    train_data_dir: str | None = _source(
        None,
        "folder of folders named <repeats>_<class>, or of images",
        differs="images directly inside are found too (1 repeat)",
        fixed=False,
    )
    reg_data_dir: str | None = _source(
        None,
        "regularisation images, in folders named <repeats>_<class>",
        fixed=False,
    )
    dataset_config: str | None = _source(
        None, "dataset TOML or JSON; its values beat all others", fixed=False
    )
    resolution: tuple[int, int] | None = _source(
        None,
        '"width,height" or one number for a square',
        differs="unset means the base's native size",
        multiple_of=8,
    )
    train_batch_size: int = _source(1, "images in a batch, per process", minimum=1)
    dataset_repeats: int = _source(1, "repeats of images named by in_json", grade="R", minimum=1)
    in_json: str | None = _source(
        None, "fine-tuning metadata: {image: {caption, tags}}", grade="R", fixed=False
    )
    data_root: str | None = _source(
        None,
        "prefix of relative image folders",
        grade="ours",
        per_task=False,
        fixed=False,
    )
    conditioning_data_dir: str | None = _source(
        None,
        "mask images (red channel), named like the images; with masked_loss",
        grade="R",
        fixed=False,
    )
    dataset_class: str | None = _source(
        None,
        "dotted path of a dataset class",
        grade="R",
        no_effect="data choices must be made per index here, which foreign datasets do not do",
    )
    debug_dataset: bool = _source(
        False,
        "show the data set instead of training",
        grade="R",
        no_effect="--dry_run prints the images, captions and buckets instead",
    )

    caption_extension: str = _caption(
        ".caption",
        "ending of caption files beside the images",
        differs="where no file has this ending but .txt files exist, those are read",
    )
    caption_extention: str | None = _caption(
        None, "old misspelling of caption_extension", grade="A"
    )
    caption_separator: str = _caption(",", "what separates tags", grade="R", keep=True)
    shuffle_caption: bool = _caption(False, "shuffle the tags of a caption")
    keep_tokens: int = _caption(0, "so many tags at the start are never shuffled", minimum=0)
    keep_tokens_separator: str = _caption(
        "",
        'tags before it are kept in place, and those after a second one ("|||")',
        grade="S",
        differs="it is taken out of the caption also where nothing is shuffled",
    )
    secondary_separator: str | None = _caption(
        None, "joins tags that are shuffled as one; written as caption_separator", grade="R"
    )
    caption_prefix: str | None = _caption(None, "put before every caption", grade="S")
    caption_suffix: str | None = _caption(None, "put after every caption", grade="S")
    enable_wildcard: bool = _caption(
        False, "{a|b} draws one; of several caption lines one is drawn", grade="S"
    )
    caption_dropout_rate: float = _caption(
        0.0, "share of captions replaced by an empty one", minimum=0, maximum=1
    )
    caption_dropout_every_n_epochs: int = _caption(
        0, "every n-th epoch has empty captions; 0 = never", grade="S", minimum=0
    )
    caption_tag_dropout_rate: float = _caption(
        0.0, "share of tags left out", grade="S", minimum=0, maximum=1
    )
    token_warmup_min: int = _caption(1, "tags at the first step", grade="R", minimum=0)
    token_warmup_step: float = _caption(
        0, "step at which all tags are there; below 1 a share of the steps", grade="R", minimum=0
    )
    weighted_captions: bool = _caption(
        False, "(word:1.2) and [word] weigh words", grade="S", per_task=False
    )
    max_token_length: int | None = _caption(
        None,
        "tokens of a caption: 75, 150 or 225",
        choices=(75, 150, 225),
        per_task=False,
        zero_unset=True,
    )

    enable_bucket: bool = _image(False, "keep aspect ratios, in buckets of equal area")
    min_bucket_reso: int = _image(256, "shortest side of a bucket, pixels", minimum=8)
    max_bucket_reso: int = _image(1024, "longest side of a bucket, pixels", minimum=8)
    bucket_reso_steps: int = _image(
        64, "sides are multiples of this, pixels", minimum=8, multiple_of=8
    )
    bucket_no_upscale: bool = _image(
        False, "never enlarge an image (min and max are then not used)"
    )
    resize_interpolation: str | None = _image(
        None,
        "how images are resized; unset: area to shrink, lanczos to enlarge",
        grade="R",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"),
    )
    skip_image_resolution: tuple[int, int] | None = _image(
        None,
        "leave out images of no more pixels than this (size as for resolution), so that a data "
        "set of a higher resolution gets no small ones",
        grade="R",
    )
    flip_aug: bool = _image(False, "mirror half of the images", grade="S")
    color_aug: bool = _image(False, "small changes of hue and gamma", grade="R")
    random_crop: bool = _image(False, "crop anywhere, not at the centre", grade="R")
    face_crop_aug_range: str | None = _image(
        None,
        "crop around faces",
        grade="R",
        no_effect="it needs face positions in the file names, from a tool that is not part of this",
    )
    alpha_mask: bool = _image(False, "transparency weighs the loss", grade="S")
    masked_loss: bool = _image(False, "mask images weigh the loss", grade="R")

    cache_latents: bool = _cache(
        False,
        "encode each image once, so that the VAE can leave memory",
        fixed=True,
        differs="set aside, with a notice, where random_crop or color_aug forbid it",
    )
    cache_latents_to_disk: bool = _cache(False, "keep cached latents on disk too")
    vae_batch_size: int = _cache(
        1, "images that the VAE encodes at once", grade="S", minimum=1, zero_unset=True
    )
    skip_cache_check: bool = _cache(
        False,
        "trust caches on disk",
        grade="R",
        no_effect="cache files are named by their contents and checked in no time",
    )
    cache_info: bool = _cache(
        False,
        "cache the list of images and captions",
        grade="S",
        no_effect="listing is fast and captions are always read afresh",
    )
    cache_text_encoder_outputs: bool = _cache(
        False,
        "encode each caption once, so that the text encoders can leave memory",
        fixed=True,
        differs="set aside, with a notice, where captions change from step to step or text "
        "encoders are trained; caption dropout works with it",
    )
    cache_text_encoder_outputs_to_disk: bool = _cache(
        False, "keep cached text-encoder outputs on disk too"
    )
    cache_dir: str | None = _cache(
        None, "folder of caches; unset: $LCP_CACHE or ~/.cache/lcp_plugin", grade="ours"
    )
