"""The built-in strategies by name. A new one costs a file, a line here, a test and a config."""

from lcp_plugin.hooks import Strategy
from lcp_plugin.strategies.bounds import Independent, Joint, MergeAtEnd
from lcp_plugin.strategies.magmax import MagMax
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.strategies.merge_ortho_init import MergeOrthoInit
from lcp_plugin.strategies.naive import Naive
from lcp_plugin.strategies.recall import Recall

BUILT_IN: dict[str, type[Strategy]] = {
    "naive": Naive,
    "merge_init": MergeInit,
    "merge_ortho_init": MergeOrthoInit,
    "magmax": MagMax,
    "recall": Recall,
    "joint": Joint,
    "independent": Independent,
    "merge_at_end": MergeAtEnd,
}

__all__ = ["BUILT_IN"]
