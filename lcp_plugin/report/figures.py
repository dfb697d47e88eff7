"""Charts as SVG that takes the page's colours and type: matplotlib draws, the page paints.

Every colour matplotlib writes is a placeholder that becomes a CSS variable afterwards, so a chart
is right on dark and light paper; text stays text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lcp_plugin.evaluation.scores import Spread

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACEHOLDERS = {
    "ink": "#000001", "soft": "#000002", "line": "#000003",
    "c1": "#000011", "c2": "#000012", "c3": "#000013",
    "c4": "#000014", "c5": "#000015", "c6": "#000016",
}  # fmt: skip
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MOST_POINTS = 1500  # of a curve: more than the columns of its picture
WIDTH, HEIGHT = 5.4, 3.3  # inches at 72 dots: the SVG's own units


@contextmanager
def _canvas(height: float = HEIGHT) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes in the page's manner, without a display."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "text.parse_math": False,
        "axes.edgecolor": PLACEHOLDERS["line"],
        "axes.labelcolor": PLACEHOLDERS["soft"],
        "xtick.color": PLACEHOLDERS["soft"],
        "ytick.color": PLACEHOLDERS["soft"],
        "text.color": PLACEHOLDERS["ink"],
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that only the reader's fonts have
        figure = Figure(figsize=(WIDTH, height), dpi=72)
        axes = figure.add_subplot()
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="y", color=PLACEHOLDERS["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        yield figure, axes


def _to_svg(figure: Any, title: str, anchor: str) -> str:
    """The drawing as an inline, named SVG element; its ids begin with `anchor`."""
    figure.tight_layout(pad=0.4)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{anchor}-\1"', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{anchor}-", svg)
    svg = re.sub(r"font: ?([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    for name, colour in PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def draw_tasks_since(
    curves: Mapping[str, Sequence[Spread]], base: Spread | None, metric: str, anchor: str
) -> str:
    """Figure 1: score on the first task against the number of tasks learned since, with the base
    line and the spread over runs.
    """
    with _canvas() as (figure, axes):
        for i, (name, points) in enumerate(curves.items()):
            colour = PLACEHOLDERS[SERIES[i % len(SERIES)]]
            means = [p.mean for p in points]
            xs = list(range(len(points)))
            dash = DASHES[i % len(DASHES)]
            axes.plot(xs, means, color=colour, linewidth=2, linestyle=dash, marker="o",
                      markersize=4, label=name)  # fmt: skip
            if max(p.count for p in points) > 1:
                low = [p.mean - p.std for p in points]
                high = [p.mean + p.std for p in points]
                axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if base is not None and not math.isnan(base.mean):
            axes.axhline(base.mean, color=PLACEHOLDERS["soft"], linewidth=1, linestyle=(0, (3, 3)),
                         label="base model")  # fmt: skip
        longest = max(len(points) for points in curves.values())
        axes.set_xticks(range(longest))
        axes.set_xlabel("tasks learned since")
        axes.set_ylabel(f"{metric} on the first task")
        _legend(axes)
        return _to_svg(figure, f"{metric} on the first task against tasks learned since", anchor)


def draw_losses(
    tasks: Sequence[tuple[str, Sequence[float]]], anchor: str, what: str = "loss", window: int = 25
) -> str:
    """A loss, one stretch per task, smoothed by a running mean; a task without any is left out."""
    stride = max(1, sum(len(losses) for _, losses in tasks) // MOST_POINTS)
    with _canvas(2.6) as (figure, axes):
        start = 0
        names, middles = [], []
        for i, (name, losses) in enumerate(tasks):
            if not losses:
                continue
            colour = PLACEHOLDERS[SERIES[i % len(SERIES)]]
            xs = range(start, start + len(losses))[::stride]
            axes.plot(xs, losses[::stride], color=colour, linewidth=0.6, alpha=0.25)
            smooth = _running_mean(losses, window)[::stride]
            axes.plot(xs, smooth, color=colour, linewidth=1.8)
            if start:
                axes.axvline(start - 0.5, color=PLACEHOLDERS["line"], linewidth=0.8)
            names.append(name if len(name) <= 14 else name[:13] + "…")
            middles.append(start + len(losses) / 2)
            start += len(losses)
        axes.set_xticks(middles, names, rotation=0 if len(names) <= 5 else 35,
                        ha="center" if len(names) <= 5 else "right")  # fmt: skip
        axes.set_ylabel(what)
        axes.margins(x=0.01)
        return _to_svg(figure, f"{what.capitalize()} of each task", anchor)


def draw_opposition(
    ratios: Mapping[str, Sequence[float]], labels: Sequence[str], anchor: str
) -> str:
    """Figure 2: opposed-parameter ratio of every later task against the first, per reading."""
    with _canvas() as (figure, axes):
        for i, (name, values) in enumerate(ratios.items()):
            colour = PLACEHOLDERS[SERIES[i % len(SERIES)]]
            axes.plot(range(len(values)), values, color=colour, linewidth=2, marker="o",
                      markersize=4, linestyle=DASHES[i % len(DASHES)], label=name)  # fmt: skip
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel("after task")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("opposed-parameter ratio")
        _legend(axes)
        return _to_svg(figure, "Opposed parameters against tasks learned", anchor)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        legend = axes.legend(handles, labels, frameon=False, loc="best", handlelength=2.4)
        for text in legend.get_texts():
            text.set_color(PLACEHOLDERS["ink"])


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, shorter at the start."""
    sums, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        sums.append(total / min(i + 1, window))
    return sums


def as_markup(svg: str) -> Any:
    """A chart that the template prints as it is."""
    from markupsafe import Markup

    return Markup(svg)
