"""A report as a list of blocks, which become Markdown or one HTML page that needs nothing else.

Words and cells are plain text; `` `code` `` is marked in both.
"""

import functools
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from aoe_jax.compare import style


@dataclass(frozen=True)
class Heading:
    """Of level 1 (the title), 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A command line or a log, as it is."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells in words; the first column is text, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure: `name` is that of its files, `caption` says what is seen."""

    name: str
    figure: Figure
    caption: str

    @functools.cached_property
    def rendered(self):
        """`(SVG, PNG)`, see `style.render`."""
        return style.render(self.figure)


@dataclass(frozen=True)
class Pictures:
    """Several beside each other, where there is room."""

    pictures: Sequence[Picture]


def save_pictures(blocks, folder: Path):
    """Every picture as PNG and as SVG."""
    folder.mkdir(exist_ok=True)
    for block in blocks:
        if isinstance(block, Pictures):
            save_pictures(block.pictures, folder)
        elif isinstance(block, Picture):
            svg, png = block.rendered
            (folder / f"{block.name}.png").write_bytes(png)
            (folder / f"{block.name}.svg").write_text(style.svg_for_file(svg))


def to_markdown(blocks, folder):
    """Markdown that names the pictures as `folder/NAME.png`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block, folder):
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Points(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Table(head, rows):
            cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
            return "\n".join(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells
            )
        case Picture(name, _, caption):
            return f"![{caption}]({folder}/{name}.png)\n\n*{caption}*"
        case Pictures(pictures):
            return "\n\n".join(_markdown(picture, folder) for picture in pictures)
    raise TypeError(block)


def to_html(blocks):
    """A page with everything in it: no scripts, no addresses, pictures as SVG in the colours of the
    page.
    """
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", body)


def _words(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html(block):
    match block:
        case Heading(level, text):
            return f"<h{level}>{_words(text)}</h{level}>"
        case Text(text):
            return f"<p>{_words(text)}</p>"
        case Points(items):
            return "<ul>" + "".join(f"<li>{_words(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(head, rows):
            cells = "".join(f"<th>{_words(cell)}</th>" for cell in head)
            lines = "".join(
                "<tr>" + "".join(f"<td>{_words(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
        case Picture(_, _, caption):
            svg = style.svg_for_page(block.rendered[0])
            picture = f'<div role="img" aria-label="{html.escape(caption)}">{svg}</div>'
            return f"<figure>{picture}<figcaption>{_words(caption)}</figcaption></figure>"
        case Pictures(pictures):
            return f'<div class="pictures">{"".join(_html(picture) for picture in pictures)}</div>'
    raise TypeError(block)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f5f5f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --line: #3a3d44; --soft: #22252b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
p, ul { max-width: 60rem; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 9rem; max-width: 45vw; }
@media (min-width: 60rem) { td:first-child { white-space: nowrap; } }
pre { overflow-x: auto; padding: .6rem; background: var(--soft); font-size: .85rem; } code { background: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0; min-width: 0; } figure svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; }
figcaption { font-size: .875rem; opacity: .8; }
</style>
</head>
<body>
BODY
</body>
</html>
"""
