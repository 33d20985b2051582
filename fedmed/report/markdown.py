"""The report as Markdown: the card for people, without plots."""

from __future__ import annotations

from fedmed.report.document import (
    Block,
    Bullets,
    Document,
    Facts,
    Figure,
    Folded,
    Table,
    Text,
    Tiles,
    Value,
)


def markdown(document: Document) -> str:
    """All sections; ``card.json`` beside it names the place of every figure."""
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    parts += [f"> {_plain(banner.text)}" for banner in document.banners]
    for section in document.sections:
        parts += [f"## {_plain(section.title)}", f"_{' · '.join(section.items)}_"]
        parts += [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text, tone):
            return f"{'> ' if tone else ''}{_plain(text)}"
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Facts(items) | Tiles(items):
            return "\n".join(f"- {_plain(name)}: {_value(value)}" for name, value in items)
        case Table():
            return _table(block)
        case Folded(_, table):
            return _table(table)
        case Figure(plot):
            return f"Plot: plots/{plot}.svg"


def _table(table: Table) -> str:
    notes = table.notes
    lines = [
        f"**{_plain(table.caption)}**",
        "",
        _line(table.head),
        _line(["---"] * len(table.head)),
    ]
    for row in table.rows:
        cells = [_value(cell, notes.index(cell.note) + 1 if cell.note else 0) for cell in row.cells]
        lines.append(_line([_plain(row.header), *cells]))
    if notes:
        lines += ["", *(f"{i}. {_plain(note)}" for i, note in enumerate(notes, start=1))]
    return "\n".join(lines)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(value: Value, note: int = 0) -> str:
    text = _plain(value.text)
    if value.interval:
        text += f" ({_plain(value.interval)})"
    if note:
        text += f" [{note}]"
    elif value.note:
        text += f": {_plain(value.note)}"
    return text


def _plain(text: str) -> str:
    """``text`` on one line, with what Markdown would read as marks escaped."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
