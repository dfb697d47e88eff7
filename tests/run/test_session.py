"""A run's process: what is kept from garbage collection comes back to it."""

from __future__ import annotations

import gc

from lcp_plugin.run.session import thawing, without_collecting


def test_what_is_made_without_collecting_is_set_aside_until_it_thaws() -> None:
    with thawing():
        with without_collecting():
            assert not gc.isenabled()
            made = [[i] for i in range(10)]
        assert gc.isenabled()
        assert gc.get_freeze_count() > len(made)
    assert gc.get_freeze_count() == 0


def test_a_process_that_does_not_collect_is_left_alone() -> None:
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
