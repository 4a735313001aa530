"""Several runs on one page: the same three plots, and a table of their last models' figures.

    python eval.py report runs/a runs/b         # several; of one run, its own report
"""
import itertools
import sys
from pathlib import Path

from harness.files import write_whole
from harness.settings import flag
from harness.views.drawing import COLORS, html_table, notice, plot, plots, shell
from harness.views.figures import CURVES, figure_rows
from harness.views.report import CAPTION, SHARES, attempt, first_plots, points, read_run, report

UNTOLD = ("out", "hours", "max_tokens_in_cache")  # settings that say nothing of the models
STROKES = {"-": "solid", "--": "dashed", ":": "dotted"}


def command(args):
    """`eval.py report RUN ...`: draw the page of a run, or of several, and print where it is."""
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if len(args.runs) == 1:
        file = args.out or f"{args.runs[0]}/report.html"
        notes = report(args.runs[0], file)
    else:
        file = args.out or Path(args.runs[0]).absolute().parent / "compare.html"
        notes = side_by_side(args.runs, file)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(file)


def side_by_side(runs, file):
    """Write a page on several runs to a file. Returns notes on what is missing or damaged."""
    names, notes = [Path(run).resolve().name for run in runs], []
    if len(set(names)) < len(names):
        names = map(str, runs)
    read = {name: read_run(run, notes) for name, run in zip(names, runs)}
    parts = [attempt("Plots", lambda: of_all(read), notes), CAPTION,
             attempt("Table", lambda: last_models(read), notes)]
    write_whole(file, shell(", ".join(read), "".join(filter(None, parts))
                            + notice("Missing from this page", notes)))
    return notes


def of_all(read):
    """Three plots, a colour for each of six runs, and what their strokes mean."""
    everything = [record for _, records in read.values() for record in records]
    ticks = {t: f"M_{t}" for t in sorted({record["iteration"] for record in everything})}
    images, strokes = [], []
    for title in first_plots(everything):
        lines, styles = lines_of(CURVES[title], {name: run[1] for name, run in read.items()})
        images.append(plot(title, lines, ticks, styles=styles, percent=title in SHARES))
        used = {style["linestyle"] for style in styles.values()}
        names = [f"{label} {STROKES[stroke]}" for stroke, label in zip(STROKES, CURVES[title])
                 if stroke in used and label]
        strokes += [f"{title}: {', '.join(names)}"] * bool(names)
    return plots(images) + f"<p><small>{'; '.join(strokes)}.</small></p>"


def lines_of(paths, runs):
    """The lines of a plot, a colour a run and a stroke a figure, and their styles.

    paths: {label: path of a figure}. runs: {name: records}.
    """
    lines, styles = {}, {}
    for stroke, (label, path) in zip(STROKES, paths.items()):
        for color, (name, records) in zip(itertools.cycle(COLORS), runs.items()):
            line = points(records, path)
            if line and line != lines.get(name):
                # Matplotlib's legends leave out what begins with "_".
                name = f"_{label} {name}" if name in lines else name
                lines[name], styles[name] = line, {"color": color, "linestyle": stroke}
    return lines, styles


def last_models(read):
    """A column for each run: what it is, and the figures of its last model."""
    last = [records[-1] if records else {} for _, records in read.values()]
    settings = [config["settings"] for config, _ in read.values()]
    differing = [name for name in dict.fromkeys(itertools.chain(*settings)) if name not in UNTOLD
                 and len({str(one.get(name)) for one in settings if one}) > 1]
    rows = [[flag(name), *(one.get(name, "unknown") for one in settings)]
            for name in dict.fromkeys(["model", "seed", *differing])]
    rows += [["last model", *(f"M_{record['iteration']}" if record else "-" for record in last)]]
    asked = {config.get("files", {}).get("--eval-prompts") for config, _ in read.values()}
    formats = {config.get("format") for config, _ in read.values()}
    warnings = ["these runs have other held-out prompts: their figures do not compare"
                ] * (len(asked) > 1)
    warnings += ["these runs are of different versions of this program, which may measure otherwise"
                 ] * (len(formats) > 1)
    return (html_table(["", *read], rows + figure_rows(last, counts=True))
            + notice("Beware", warnings))
