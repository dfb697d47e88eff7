"""What --no_metadata leaves in a header."""

from __future__ import annotations

from lcp_plugin.formats.header import strip_metadata


def test_only_what_readers_need_is_left() -> None:
    header = {
        "ss_v2": "False",
        "ss_network_dim": "16",
        "ss_tag_frequency": '{"1_me": {"my name": 3}}',
        "ss_dataset_dirs": "{}",
        "ss_lcp_tasks": "[]",
        "ss_seed": "1",
        "sshs_model_hash": "ab",
        "modelspec.title": "dog",
    }
    assert set(strip_metadata(header)) == {
        "ss_v2",
        "ss_network_dim",
        "sshs_model_hash",
        "modelspec.title",
    }
