"""Tables in the paper's form: mean +- std over runs, the best bold, the second underlined.

One `Table`, three ways of writing it: Markdown, CSV, LaTeX (booktabs). Ranks are taken among the
rows that compete; a base row and the ceilings stand apart.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lcp_plugin.evaluation.scores import Spread


@dataclass(frozen=True)
class Column:
    """A measure; `lower_is_better` decides which cell is the best."""

    title: str
    lower_is_better: bool = False


@dataclass(frozen=True)
class Row:
    """One strategy (or the base, or a ceiling). None is an empty cell."""

    title: str
    cells: tuple[Spread | None, ...]
    competes: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of spreads under named columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    corner: str = "strategy"
    caption: str = ""
    digits: int = 3
    ranks: tuple[tuple[int, ...], ...] = field(init=False)  # per row and column; 0 does not compete

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"{row.title}: {len(row.cells)} cells, {len(self.columns)} wanted")
        by_column = [self._rank_column(c) for c in range(len(self.columns))]
        ranks = tuple(
            tuple(by_column[c][r] for c in range(len(self.columns))) for r in range(len(self.rows))
        )
        object.__setattr__(self, "ranks", ranks)

    def _rank_column(self, column: int) -> list[int]:
        """1 for the best printed mean, 2 for the next; equal figures share their rank."""
        values = [self._printed(row, column) for row in self.rows]
        distinct = sorted(
            {v for v in values if v is not None},
            reverse=not self.columns[column].lower_is_better,
        )
        return [0 if v is None else distinct.index(v) + 1 for v in values]

    def _printed(self, row: Row, column: int) -> float | None:
        cell = row.cells[column]
        if not row.competes or cell is None or math.isnan(cell.mean):
            return None
        return round(cell.mean, self.digits)

    def text_of(self, row: int, column: int, plus_minus: str = " ± ") -> str:
        """A cell as printed: `.457 ± .011`; no spread for a single run; a dash when empty."""
        cell = self.rows[row].cells[column]
        if cell is None or math.isnan(cell.mean):
            return "–"
        text = format_number(cell.mean, self.digits)
        return text + plus_minus + format_number(cell.std, self.digits) if cell.count > 1 else text


def format_number(value: float, digits: int = 3) -> str:
    """`.457`, `-.020`, `1.000`: no leading zero, as the paper prints scores."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def to_markdown(table: Table) -> str:
    """A GitHub table; best **bold**, second <u>underlined</u>."""
    head = [table.corner, *(_arrow(c) for c in table.columns)]
    lines = [_pipe(head), _pipe([":--", *("--:" for _ in table.columns)])]
    marks = {1: ("**", "**"), 2: ("<u>", "</u>")}
    for r, row in enumerate(table.rows):
        cells = [_mark(table, r, c, marks) for c in range(len(table.columns))]
        lines.append(_pipe([row.title.replace("|", "\\|"), *cells]))
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Full precision: `<measure>`, `<measure> std`, `<measure> runs` for every column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = [table.corner]
    for column in table.columns:
        head += [column.title, f"{column.title} std", f"{column.title} runs"]
    writer.writerow(head)
    for row in table.rows:
        cells: list[str | float | int] = [row.title]
        for cell in row.cells:
            empty = cell is None or math.isnan(cell.mean)
            cells += ["", "", 0] if cell is None or empty else [cell.mean, cell.std, cell.count]
        writer.writerow(cells)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs tabular; best in bold, second underlined."""
    lines = [r"\begin{tabular}{l" + "r" * len(table.columns) + "}", r"\toprule"]
    lines.append(_latex_row([table.corner, *(_arrow(c) for c in table.columns)]))
    lines.append(r"\midrule")
    marks = {1: (r"\textbf{", "}"), 2: (r"\underline{", "}")}
    for r, row in enumerate(table.rows):
        cells = [_mark(table, r, c, marks, r"\,\textpm\,") for c in range(len(table.columns))]
        lines.append(" & ".join([escape_latex(row.title), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.caption:
        lines.insert(0, "% " + table.caption.replace("\n", " "))
    text = "\n".join(lines) + "\n"
    for sign, command in (("↑", r"$\uparrow$"), ("↓", r"$\downarrow$"), ("–", "--")):
        text = text.replace(sign, command)
    return text


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)


def _mark(
    table: Table,
    row: int,
    column: int,
    marks: dict[int, tuple[str, str]],
    plus_minus: str = " ± ",
) -> str:
    before, after = marks.get(table.ranks[row][column], ("", ""))
    return before + table.text_of(row, column, plus_minus) + after


def _arrow(column: Column) -> str:
    return f"{column.title} {'↓' if column.lower_is_better else '↑'}"


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(c) for c in cells) + r" \\"
