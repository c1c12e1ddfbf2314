"""A report as one HTML page that opens from disk: pictures, tables and text, and nothing that is fetched."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color: #1c1c1e; background: #fbfbfa; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .8rem; border-top: 1px solid #d8d8d4; }
h2, h3 { overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p.lead, p.note, figcaption { color: #55555a; margin: .2rem 0 .8rem; max-width: 48rem; overflow-wrap: anywhere; }
p.note, figcaption { font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e6e6e2; vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.ours td { background: #eef4fb; }
td.missing { text-align: right; color: #8a8a8e; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; min-width: 0; }
figure .scroll { background: #fff; border: 1px solid #e6e6e2; }
img { display: block; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: #f2f2ef; padding: .7rem; font-size: .82rem; line-height: 1.4; }
code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        title: above the picture.
        caption: what is to be seen.
        png: the picture.
        pixels: whether it is of pixels, which stay sharp when enlarged, or of lines.
    """

    title: str
    caption: str
    png: bytes
    pixels: bool = True


@dataclass(frozen=True)
class Table:
    """A table with its title.

    Attributes:
        title: above the table.
        note: below it; what must be known to read it.
        header: names of the columns; the first is of text, the others of figures.
        rows: the cells, and whether the row is one of ours.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[tuple[bool, Sequence[str]]]


@dataclass(frozen=True)
class Listing:
    """Text as it is, folded away.

    Attributes:
        title: what it is.
        text: the text.
    """

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the part.
        facts: what is said first, names and values.
        tables: its tables.
        pictures: its pictures.
        listings: its listings.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    listings: Sequence[Listing] = ()


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Returns the page."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    if section.facts:
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{_value(value)}</td></tr>" for name, value in section.facts)
        parts.append(f'<div class="scroll"><table>{rows}</table></div>')
    parts += [_table(table) for table in section.tables]
    if section.pictures:
        parts.append('<div class="figures">' + "\n".join(map(_picture, section.pictures)) + "</div>")
    parts += [
        f"<details><summary>{escape(listing.title)}</summary><pre>{escape(listing.text)}</pre></details>"
        for listing in section.listings
    ]
    return "\n".join(parts) + "\n</section>"


def _value(value: str) -> str:
    text = f"<code>{escape(value)}</code>"
    return f'<a href="{escape(value)}">{text}</a>' if value.startswith(("http://", "https://")) else text


def _table(table: Table) -> str:
    head = "".join(
        f"<th{' class=number' if column else ''}>{escape(name)}</th>" for column, name in enumerate(table.header)
    )
    rows = "".join(
        f"<tr{' class=ours' if ours else ''}>" + "".join(_cell(i, cell) for i, cell in enumerate(cells)) + "</tr>"
        for ours, cells in table.rows
    )
    return (
        f'<h3>{escape(table.title)}</h3>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div>\n<p class="note">{escape(table.note)}</p>'
    )


def _cell(column: int, cell: str) -> str:
    kind = "missing" if cell == NOT_MEASURED else "number" if column else ""
    return f"<td{f' class={kind}' if kind else ''}>{escape(cell)}</td>"


NOT_MEASURED = "not measured"


def _picture(picture: Picture) -> str:
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode()
    kind = " class=pixels" if picture.pixels else ""
    return (
        f"<figure><h3>{escape(picture.title)}</h3>\n"
        f'<div class="scroll"><img{kind} alt="{escape(picture.title)}" src="{source}"></div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def number(value: float | None) -> str:
    """Returns a figure to two digits after the point; nothing for `None`."""
    if value is None:
        return ""
    if value == 0 or 1e-2 <= abs(value) < 1e6:
        return f"{value:,.2f}"
    return f"{value:.1e}"


def setting(value: float | None) -> str:
    """Returns what was set or chosen, a rate or a variance, to three significant digits."""
    return "" if value is None else f"{value:.3g}"
