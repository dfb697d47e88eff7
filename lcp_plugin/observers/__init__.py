"""The built-in observers by name."""

from lcp_plugin.hooks import Observer
from lcp_plugin.observers.console import Console
from lcp_plugin.observers.jsonl import JsonLines
from lcp_plugin.observers.trackers import Trackers

BUILT_IN: dict[str, type[Observer]] = {
    "console": Console,
    "jsonl": JsonLines,
    "trackers": Trackers,
}

__all__ = ["BUILT_IN", "Console", "JsonLines", "Trackers"]
