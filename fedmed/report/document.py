"""What a report says, before it is HTML or Markdown: sections of text, facts, tables and plots."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Value:
    """One shown value.

    Attributes:
        text: as a person reads it.
        interval: its 95 % interval, ``0.91 to 0.95``; empty where there is none.
        trace: where it stands in the run folder; empty for words of the report itself.
        source: what it rests on, one sentence.
        note: why there is no value or no interval.
        tone: how a verdict looks: ``good``, ``bad``, ``unsure``, ``quiet`` or empty.
    """

    text: str
    interval: str = ""
    trace: str = ""
    source: str = ""
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table: its header cell and its values."""

    header: str
    cells: tuple[Value, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns, that of the row headers first.
        notes: remarks below, which cells refer to by number.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Distinct notes of the cells, in the order of their numbers from 1."""
        return tuple(dict.fromkeys(c.note for r in self.rows for c in r.cells if c.note))


@dataclass(frozen=True)
class Text:
    """A paragraph; ``tone`` as for :class:`Value`, set apart where it is not empty."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Terms and their values."""

    items: tuple[tuple[str, Value], ...]

    @property
    def short(self) -> bool:
        """Whether several fit on a line."""
        return all(len(value.text + value.interval) < 28 for _, value in self.items)


@dataclass(frozen=True)
class Tiles:
    """The few facts that a hurried reader takes away."""

    items: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Figure:
    """The place of a plot, by its name."""

    plot: str


@dataclass(frozen=True)
class Folded:
    """A table that is shown on demand, under a summary line; printed unless it is very long."""

    summary: str
    table: Table


Block = Table | Text | Bullets | Facts | Tiles | Figure | Folded


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        key: its anchor.
        items: the items of reporting guidelines it answers, ``CHAI: Warnings``.
    """

    key: str
    title: str
    items: tuple[str, ...]
    blocks: tuple[Block, ...] = field(default=())

    @property
    def values(self) -> tuple[tuple[str, Value], ...]:
        """Every traced value of the section with a name that tells it apart."""
        found: list[tuple[str, Value]] = []
        for block in self.blocks:
            match block:
                case Facts(items) | Tiles(items):
                    found += items
                case Table() | Folded():
                    table = block.table if isinstance(block, Folded) else block
                    found += [
                        (f"{row.header}, {name}", cell)
                        for row in table.rows
                        for name, cell in zip(table.head[1:], row.cells, strict=True)
                    ]
        return tuple((name, value) for name, value in found if value.trace)


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        banners: warnings that stand above everything.
    """

    title: str
    subtitle: str
    banners: tuple[Text, ...]
    sections: tuple[Section, ...]

    @property
    def plots(self) -> frozenset[str]:
        """Names of the plots it has a place for."""
        blocks = (block for section in self.sections for block in section.blocks)
        return frozenset(block.plot for block in blocks if isinstance(block, Figure))

    def with_plots(self, drawn: Collection[str]) -> Document:
        """The report without places for plots that could not be drawn."""
        sections = (
            replace(section, blocks=tuple(
                b for b in section.blocks if not isinstance(b, Figure) or b.plot in drawn
            ))
            for section in self.sections
        )  # fmt: skip
        return replace(self, sections=tuple(sections))
