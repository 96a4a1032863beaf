"""How figures look: one colour an arm everywhere, labels at the ends of lines, sizes that a phone
shows as they are.

Text and axes have the colour `INK`, which `svg_for_page` turns into the colour of the page's text,
light or dark.
"""

import io
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is pale on white,
# and black, on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (8, 3)), (0, (1, 3)))
INK, PAPER_INK = "#010203", "#222222"
WIDTH = 4.6  # inches: what a phone shows without shrinking
LABEL_HEIGHT = 0.14  # inches, of a line of text at the end of a line
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "aoe_jax",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.w_pad": 0.08,  # inches: in a PNG text may be a little wider than it was when it was laid out
}


def style_of(arms):
    """name -> colour and line style, by the order of the suite; the first seven differ in colour.

    Raises:
      ValueError: there are more arms than styles.
    """
    if len(arms) > len(COLOURS) * len(DASHES):
        raise ValueError(
            f"{len(arms)} arms, and {len(COLOURS) * len(DASHES)} styles of line to tell them apart"
        )
    return {
        arm: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS)]}
        for i, arm in enumerate(arms)
    }


def new_figure(height, rows=1, columns=1, width=WIDTH, **options):
    """A `Figure` and its axes, an array `[rows, columns]`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def height_for(n_labels, least):
    """The height of a figure, `least` or more, whose axes have room beside them for labels at the
    ends of lines.
    """
    return max(least, 0.7 + LABEL_HEIGHT * n_labels)


def label_ends(axes, ends):
    """Writes labels beside the right ends of lines, moved apart where they would overlap.

    Args:
      axes: with its limits set by all that is drawn, and laid out.
      ends: `[(y, text, style)]`, the style as in `style_of`: a piece of the line lies before the
        text.
    """
    room = (
        LABEL_HEIGHT * axes.figure.dpi / axes.get_window_extent().height
    )  # of a label, as a share of the height
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    transform = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    places = sorted(
        (
            (float(transform.transform((x, y))[1]), text, line_style)
            for y, text, line_style in ends
            if low <= y <= high or log
        ),
        key=lambda place: place[:2],
    )
    heights = []
    for place, *_ in places:
        heights.append(max(place, heights[-1] + room) if heights else place)
    limit = 1.0
    for i in reversed(range(len(heights))):  # down again, no further than they must be
        heights[i] = min(heights[i], limit)
        limit = heights[i] - room
    inch = 1 / (axes.get_window_extent().width / axes.figure.dpi)
    start, end = 1 + 0.1 * inch, 1 + 0.4 * inch
    for (place, text, line_style), height in zip(places, heights, strict=True):
        options = {"transform": axes.transAxes, "clip_on": False, "color": line_style["color"]}
        axes.add_line(Line2D((1, start), (place, height), linewidth=0.6, **options))
        axes.add_line(
            Line2D(
                (start, end),
                (height, height),
                linestyle=line_style["linestyle"],
                linewidth=1.2,
                **options,
            )
        )
        axes.text(end + 0.05 * inch, height, text, fontsize=8, va="center", **options)


def render(figure):
    """`(SVG, PNG)` of a figure, text and bytes: the SVG has no background and text in `INK`, the
    PNG lies on white.
    """
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.set_layout_engine("none")  # it is laid out now
        figure.savefig(png, dpi=160, facecolor="white")
    return svg.getvalue(), png.getvalue()


def svg_for_page(svg):
    """SVG to put into an HTML page: text in the colour of the page, no numbered ids to clash, as
    wide as there is room.
    """
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(
        "xlink:href", "href"
    )
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"',
        r'\1 style="max-width:\2pt"',
        svg,
        count=1,
    )


def svg_for_file(svg):
    """SVG that stands alone, on white."""
    end = svg.index(">", svg.index("<svg")) + 1
    return (
        svg[:end]
        + '<rect width="100%" height="100%" fill="white"/>'
        + svg[end:].replace(INK, PAPER_INK)
    )
