"""Building blocks of a page, which escape every text: tables, folds, plots, the page around them.

Nothing here knows what a run is. A page is one file that fetches nothing and runs nothing.
"""
import base64
import html
import io
import math

STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
h1{font-size:1.1rem;margin:0;opacity:.75}h2{font-size:1.1rem;margin:1.5rem 0 .5rem}
summary h2{display:inline}.said{font-size:1.4rem;margin:.5rem 0 1rem}small{opacity:.75}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
th{font-weight:600}td:first-child,th:first-child{text-align:left;white-space:normal}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem}
img{width:100%;max-width:34rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.6rem;border-radius:.4rem;
margin:.3rem 0}
details{margin:.6rem 0;padding-left:.6rem;border-left:2px solid #8884}summary{cursor:pointer}
.good{border-left:4px solid #2a2}.bad{border-left:4px solid #c33}
.answers{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(13rem,1fr);gap:1rem;
overflow-x:auto}.answers pre{font:.9rem/1.45 system-ui,sans-serif;max-height:24rem;overflow-y:auto}
@media(max-width:40rem){td,th{padding:.2rem .25rem;font-size:.8rem}}
.h1{background:#3f87d922}.h2{background:#3f87d955}.h3{background:#3f87d988}.h4{background:#3f87d9bb}
"""


def pre(text, kind=""):
    return f'<pre class="{kind}">{html.escape(text)}</pre>'


def details(title, body):
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def notice(title, lines):
    if not lines:
        return ""
    return f'<p><small><b>{title}:</b> {"<br>".join(map(html.escape, lines))}</small></p>'


def cells(tag, values, shaded=0):
    """A row. shaded: how many of its cells, behind the first, hold shares that are shaded."""
    shown = []
    for i, value in enumerate(map(str, values)):
        share = value.replace(".", "", 1).isdigit() and 0 < i <= shaded
        shade = f' class="h{min(4, math.ceil(4 * float(value)))}"' if share else ""
        shown.append(f"<{tag}{shade}>{html.escape(value)}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"


def html_table(head, rows, shaded=0):
    return f"<table>{cells('th', head)}{''.join(cells('td', row, shaded) for row in rows)}</table>"


def shell(title, body):
    title = html.escape(title)
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content='width=device-width'><title>{title}</title>
<style>{STYLE}</style><h1>{title}</h1>
{body}</html>
"""


# ---- plots

INK = "#7a7a7a"  # a grey that can be read on a light page and on a dark one
COLORS = ["#3f87d9", "#e07b2e", "#3f9e57", "#cf4f78", "#8c6fd1", "#8a8a3a"]
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 9,
        "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 8, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}


def plot(title, lines, ticks=None, xlabel="", borders=(), styles=None, percent=False):
    """Lines {label: points} as an image inside the page; "" without any.

    points: (x, y), or (x, y, low, high) for a light band behind the line. ticks: {x: its name}; an
    axis with such begins at 0. borders: where to draw a dotted vertical line. styles: {label: how}.
    percent: the numbers are shares.
    """
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return ""
    import matplotlib  # here, since most commands draw nothing and need not wait for it
    from matplotlib.figure import Figure
    with matplotlib.rc_context(LOOK | {"axes.prop_cycle": matplotlib.cycler(color=COLORS)}):
        figure = Figure(figsize=(4, 2.8))
        axis = figure.subplots()
        figure.subplots_adjust(left=0.13, right=0.98, top=0.9, bottom=0.17 if xlabel else 0.1)
        draw_lines(axis, lines, styles or {})
        for border in borders:
            axis.axvline(border, color=INK, linewidth=0.5, linestyle=":")
        if ticks:
            axis.set_xticks(list(ticks), list(ticks.values()))
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        if percent:
            axis.yaxis.set_major_formatter("{x:.0%}")
        axis.set(title=title, xlabel=xlabel)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    content = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{content}">'


def draw_lines(axis, lines, styles):
    for label, points in lines.items():
        x, y, *band = zip(*points)
        (line,) = axis.plot(x, y, label=label or None, linewidth=1.4, markersize=4,
                            marker="o" if len(points) < 60 else None, **styles.get(label, {}))
        if band:
            axis.fill_between(x, *band, color=line.get_color(), alpha=0.18, linewidth=0)
    if any(lines):
        axis.legend()


def plots(images):
    return f'<div class="plots">{"".join(images)}</div>' if any(images) else ""
