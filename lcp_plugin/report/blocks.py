"""What a chapter is made of. The template prints each kind; a chapter puts them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lcp_plugin.evaluation.tables import Table
from lcp_plugin.report.inline import Embedded


@dataclass(frozen=True)
class Block:
    """One piece of a chapter; `kind` chooses how it is printed."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Subtitle(Block):
    """A heading inside a chapter."""

    text: str
    kind: ClassVar[str] = "subtitle"


@dataclass(frozen=True)
class Scores(Block):
    """The paper's table: spreads, the best bold."""

    table: Table
    kind: ClassVar[str] = "scores"


@dataclass(frozen=True)
class Rows(Block):
    """A table of texts, the first of each row its name."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = frozenset()  # (row, column) in bold
    kind: ClassVar[str] = "rows"


@dataclass(frozen=True)
class Figure:
    """A chart."""

    svg: Any  # markup
    caption: str
    title: str = ""


@dataclass(frozen=True)
class Figures(Block):
    """Charts side by side, where there is room."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Cell:
    """Of a map: `shade` from 0 to 100; a lost one is crossed out."""

    text: str = ""
    shade: int = 0
    lost: bool = False


@dataclass(frozen=True)
class Map:
    """A coloured table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str


@dataclass(frozen=True)
class Maps(Block):
    """Coloured tables side by side, where there is room."""

    maps: Sequence[Map]
    kind: ClassVar[str] = "maps"


@dataclass(frozen=True)
class Gallery(Block):
    """Pictures in rows and columns; each cell has several, and a word on what is lost in it."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[Sequence[Embedded], str]]]]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Concepts(Block):
    """The tasks in order, with what was learned from: index, concept, about, prompt, pictures."""

    concepts: Sequence[Mapping[str, Any]]
    kind: ClassVar[str] = "concepts"


@dataclass(frozen=True)
class Slider(Block):
    """Samples of every concept, one state of the model at a time."""

    number: int  # of the run on the page
    stages: Sequence[Mapping[str, Any]]  # index, name
    rows: Sequence[Mapping[str, Any]]  # index, concept, cells (stage, pictures, lost)
    kind: ClassVar[str] = "slider"


@dataclass(frozen=True)
class Folded(Block):
    """Names and texts that open at a click."""

    title: str
    entries: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Words(Block):
    """Terms and what they mean."""

    terms: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "words"
