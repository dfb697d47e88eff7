"""--no_metadata: what stays in a file's header."""

from __future__ import annotations

from collections.abc import Mapping

# readers need these to tell what the file is (kohya-ss/sd-scripts, library/train_util.py)
INDISPENSABLE = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "sshs_model_hash",
    "sshs_legacy_hash",
)


def strip_metadata(header: Mapping[str, str]) -> dict[str, str]:
    """The indispensable keys and `modelspec.*`; prompts, folders, seeds and lineage are left out.

    A chain can still go on from such a file, as from anyone's LoRA.
    """
    return {
        key: value
        for key, value in header.items()
        if key in INDISPENSABLE or key.startswith("modelspec.")
    }
