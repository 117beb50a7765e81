"""A page of HTML that needs nothing but a browser: its sections, pictures that carry their own bytes, and its style.

No reader of the method needs this file.
"""

import base64
import html
import io

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
p { max-width: 50rem; } h1 { font-size: clamp(1.3rem, 5vw, 2rem); } h3 { margin-bottom: .3rem; }
figure { margin: 0; max-width: 20rem; } figcaption { font-size: .85rem; line-height: 1.3; }
img { width: 100%; height: auto; display: block; }
.cells { display: grid; gap: .4rem; margin-bottom: .4rem; }
.columns { display: grid; gap: .4rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
.columns p { margin: .2rem 0; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.chart { min-width: 0; } .chart.wide { max-width: 46rem; }
.chart > svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font-size: 12.5px; } svg .title { font-weight: 600; font-size: 14px; }
.axis { stroke: currentColor; fill: none; } .grid { stroke: var(--line); } .curve { fill: none; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .2rem 0 1rem; }
.legend span { display: inline-flex; align-items: center; gap: .3rem; }
table { border-collapse: collapse; overflow-wrap: normal; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; font-weight: normal; border-bottom: 1px solid var(--line); }
.missing { border-left: 4px solid #E69F00; padding: .2rem .8rem; } nav a { margin-right: 1rem; }
@media (max-width: 30rem) { figcaption { font-size: .7rem; } td { padding-right: .4rem; } }
"""


def page(title: str, sections: list[tuple[str, str]]) -> str:
    """The whole page from (heading, HTML) of each section."""
    links = "".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(f'<section id="s{i}"><h2>{html.escape(name)}</h2>{content}</section>'
                   for i, (name, content) in enumerate(sections))
    title = html.escape(title)
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><h1>{title}</h1><nav>{links}</nav>{body}</body></html>")


def cells(pictures: list[tuple[np.ndarray, str]], smallest: int = 150, alternative: str = "") -> str:
    """Pictures [h, w, 3] in a grid that fills the width, as many in a row as fit.

    pictures      with plain text for below each of them
    smallest      width of a picture in pixels, below which a row holds one less
    alternative   what to read out for pictures without a text
    """
    figures = "".join(f"<figure>{embed(picture, caption or alternative, smallest)}"
                      f"<figcaption>{html.escape(caption)}</figcaption></figure>" for picture, caption in pictures)
    columns = f"repeat(auto-fit, minmax(min({smallest}px, 100%), 1fr))"
    return f'<div class="cells" style="grid-template-columns: {columns}">{figures}</div>'


def embed(picture: np.ndarray, alternative: str, width: int) -> str:
    """An <img> that carries its own bytes, for a place that is `width` pixels wide or up to twice as much.

    A small picture is enlarged with hard edges: a browser would blur them.
    """
    factor = max(1, round(2 * width / picture.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(picture.repeat(factor, axis=0).repeat(factor, axis=1)).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}">'


def table(rows: list) -> str:
    """Rows of plain text as an HTML table."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def missing(text: str) -> str:
    """A note on what is not shown, and why."""
    return f'<p class="missing">{html.escape(text)}</p>'
