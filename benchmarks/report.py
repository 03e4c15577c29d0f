"""
The report of a benchmark run, as Markdown and HTML with plots.

The document is a list of blocks, built once and rendered twice. The same figures produce the same bytes.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, StrMethodFormatter

TARGET_MS = 100
RAW, CHATDB, SQLMODEL = "raw asyncpg", "chatdb", "SQLModel"
COLOURS = {RAW: "#8c8c8c", CHATDB: "#0072b2", "psycopg 3": "#e69f00", SQLMODEL: "#882255"}
"""Each contender's colour in every plot. The colours also differ in lightness for colour-blind readers."""
OTHER, LIMIT = "#009e73", "#b42318"
NONE = "\N{EN DASH}"
PLOTS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}
PAGE = """\
:root { color-scheme: light dark; --line: #d0d7de; --head: #f6f8fa; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --line: #444c56; --head: #22272e; --bad: #ff8a75 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .75rem }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap }
th { background: var(--head) }
.left { text-align: left; white-space: normal; min-width: 9rem }
strong { color: var(--bad) }
figure { margin: 1.5rem 0 }
svg { display: block; width: 100%; min-width: 40rem; height: auto }
figcaption { font-size: .875rem }
"""

Run = dict[str, Any]


@dataclass(frozen=True)
class Heading:
    """A heading. The title has level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text, which may contain `code` and **failures** in bold."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text. The first `left` columns hold words, the others figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Plot:
    """An SVG with its file name and caption."""

    name: str
    svg: str
    caption: str


Block = Heading | Paragraph | Table | Plot


def number(value: float | None, unit: str = "") -> str:
    """Return a figure rounded to its meaningful digits, or a dash for None."""
    if value is None:
        return NONE
    digits = 0 if abs(value) >= 1000 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}{unit if unit in ('', 'x') else f' {unit}'}"


def duration(us: float) -> str:
    """Return microseconds in the most readable unit."""
    return f"{us:g} µs" if us < 1000 else f"{us / 1000:g} ms" if us < 1e6 else f"{us / 1e6:g} s"


def ratio(row: dict[str, float], name: str, base: str) -> float | None:
    """Return one contender's figure divided by another's, or None if either is unknown."""
    return row[name] / row[base] if name in row and row.get(base) else None


def unique(items: Iterable[str]) -> list[str]:
    """Return the distinct items in order of first appearance."""
    return list(dict.fromkeys(items))


def by_loop(rows: list[Run], field: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return a field of each row, nested by loop, title and contender."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["loop"], {}).setdefault(row["title"], {})[row["contender"]] = row[field]
    return found


def contenders(rows: list[Run]) -> list[str]:
    """Return the contenders of this run, first those with a colour of their own."""
    present = [row["contender"] for row in rows]
    return unique([*(name for name in COLOURS if name in present), *present])


def comparison(titles: dict[str, dict[str, float]], names: list[str], *pairs: tuple[str, str]) -> Table:
    """Return a table with a row for each title: every contender's figure and the ratio of each pair."""
    rows = [
        (title, *(number(row.get(name)) for name in names), *(number(ratio(row, *pair), "x") for pair in pairs))
        for title, row in titles.items()
    ]
    return Table(("Operation", *names, *(" / ".join(pair) for pair in pairs)), rows)


def plot(name: str, caption: str, size: tuple[int, int, float], draw: Callable[[Figure, Any], None]) -> Plot:
    """Draw a grid of axes with `draw`, and remove everything from the SVG that varies between runs."""
    rows, columns, height = size
    with mpl.rc_context(PLOTS | {"svg.hashsalt": name}):  # keeps ids distinct between the plots of a page
        figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
        draw(figure, figure.subplots(rows, columns, squeeze=False))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| id=\"[\w.]+_\d+\"", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg).replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return Plot(name, svg[svg.index("<svg") :], caption)


def log_scale(axes: Axes, low: float, high: float, text: Callable[[float], str] = "{:g}".format) -> None:
    """Set a logarithmic scale with three to six round numbers on the x axis."""
    at: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [n / 10 for n in range(10, 100)]):
        at = at if len(at) > 2 else [s * 10**p for p in range(-3, 9) for s in steps if low <= s * 10**p <= high]
    at = at[:: 1 + len(at) // 7]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(at, [text(value) for value in at])
    axes.xaxis.set_minor_locator(NullLocator())


def bars(axes: Axes, groups: list[str], values: dict[str, list[float | None]], base: int, form: str) -> None:
    """Draw a group of horizontal bars for each label, one bar for each contender, starting at `base`."""
    height = 0.8 / len(values)
    for place, (name, row) in enumerate(values.items()):
        for group, value in enumerate(row):
            if value is not None:
                y = group + (place - (len(values) - 1) / 2) * height
                axes.barh(y, value - base, height * 0.9, left=base, color=COLOURS.get(name, OTHER))
                mark(axes, form.format(value), max(value, base), y, (3, 0), va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), [textwrap.fill(group, 34) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def mark(axes: Axes, text: str, x: float, y: float, offset: tuple[int, int], **style: Any) -> None:
    """Write a figure beside its data point."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", **style)


def curve(axes: Axes, sample: list[float], **style: Any) -> tuple[float, float]:
    """Draw the cumulative share of calls by time, up to p99, and return the first and last time."""
    ordered = sorted(sample)
    shares = [*range(0, 99, 2), 99]
    points = [ordered[round(share / 100 * (len(ordered) - 1))] for share in shares]
    axes.plot(points, shares, **style)
    axes.set_ylim(0, 100)
    axes.set_yticks((0, 50, 100), ("0 %", "50 %", "100 %"))
    return points[0], points[-1]


def legend(figure: Figure, names: list[str]) -> None:
    """Draw the legend above the plot."""
    handles = [Patch(color=COLOURS.get(name, OTHER), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names))


def summary(run: Run) -> list[Block]:
    """Return the title and the outcome."""
    judged = [gate for gate in run["gates"] if gate["passed"] is not None]
    fell = [f"{gate['title']} ({number(gate['value'], gate['unit'])})" for gate in judged if not gate["passed"]]
    outcome = f"All {len(judged)} gates passed" if judged else "No gate was judged"
    if fell:
        outcome = f"**{len(fell)} of {len(judged)} gates failed**: {'; '.join(fell)}"
    if judged and len(judged) < len(run["gates"]):
        outcome += f"; {len(run['gates']) - len(judged)} not judged in this run"
    started = datetime.fromisoformat(run["started"])
    minutes, seconds = divmod(round(run["seconds"]), 60)
    sizes = ", ".join(size.replace("k", " k").replace("m", " M") for size in run["sizes"])
    what = f"{run['mode'].capitalize()} run" + (f" on {sizes} messages" if sizes else "")
    when = f"{started.day} {started:%B %Y, %H:%M %Z}".rstrip()
    text = f"{outcome}. {what}, {when}, in {minutes} min {seconds} s."
    return [Heading("chatdb: benchmarks", 1), Paragraph(text)]


def target(run: Run) -> list[Block]:
    """Return the times of a history of 100 messages in each case, compared with the target."""
    places, blue = run["places"], COLOURS[CHATDB]
    if not places:
        return []

    def draw(figure: Figure, grid: Any) -> None:
        axes = grid[0][0]
        axes.axvline(TARGET_MS, color=LIMIT)
        for y, place in enumerate(places):
            axes.plot((place["median_ms"], place["p99_ms"]), (y, y), "o-", color=blue, markersize=7, linewidth=2)
            axes.plot(place["median_ms"], y, "o", color=blue, markerfacecolor="white", markersize=7)
            axes.text(1.01, y, number(place["p99_ms"], "ms"), transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(places)), [place["name"] for place in places])
        axes.set_ylim(len(places) - 0.5, -0.5)
        highest = max(TARGET_MS, *(place["p99_ms"] for place in places))
        log_scale(axes, min(place["median_ms"] for place in places) / 1.5, highest * 1.3)
        axes.set_xlabel("ms (log scale)")

    slowest = max(places, key=lambda place: place["p99_ms"])
    text = (
        "chatdb reads the newest 100 messages of a conversation as records through its pool. "
        f"The highest p99 is {number(slowest['p99_ms'])} ms ({slowest['name']})."
    )
    rows = [
        (p["name"], p["title"], *(number(p[field]) for field in ("calls", "median_ms", "p99_ms")), yes)
        for p, yes in ((p, "yes" if p["p99_ms"] < TARGET_MS else "**no**") for p in places)
    ]
    head = ("Case", "Description", "Calls", "Median, ms", "p99, ms", f"Under {TARGET_MS} ms")
    caption = "Median (ring) and p99 (dot, value on the right) of a history of 100. The red line is the target."
    return [
        Heading(f"The target: 100 messages in under {TARGET_MS} ms"),
        Paragraph(text),
        Table(head, rows, left=2),
        plot("target", caption, (1, 1, 0.9 + 0.36 * len(places)), draw),
    ]


def operations(run: Run) -> list[Block]:
    """Return each operation's times as tables, ratios and distributions."""
    if not run["timings"]:
        return []
    text = (
        "The contenders do the same work in one run and take turns. Raw asyncpg uses one bare connection, chatdb its "
        "pool. The last two columns give chatdb's time as a multiple of raw asyncpg's, and SQLModel's as a multiple of "
        "chatdb's."
    )
    blocks: list[Block] = [Heading("Operations"), Paragraph(text)]
    if floor := run["floor"]:
        kind = "median" if "median_us" in floor else "mean"
        blocks.append(
            Paragraph(
                f"The server alone takes {number(floor[f'{kind}_us'])} µs for a history of 100 ({kind}; "
                f"{floor['text']})."
            )
        )
    names = contenders(run["timings"])
    for loop, titles in by_loop(run["timings"], "median_us").items():
        blocks.append(Heading(f"Median call time on {loop}, µs", 3))
        blocks.append(comparison(titles, names, (CHATDB, RAW), (SQLMODEL, CHATDB)))
    return [*blocks, *ratios(run), *distributions(run)]


def ratios(run: Run) -> list[Block]:
    """Return the plot of medians relative to raw asyncpg's."""
    medians = by_loop(run["timings"], "median_us")
    titles = unique(row["title"] for row in run["timings"] if row["contender"] == RAW)
    names = [name for name in contenders(run["timings"]) if name != RAW]
    against = {
        loop: {name: [ratio(rows.get(title, {}), name, RAW) for title in titles] for name in names}
        for loop, rows in medians.items()
    }
    known = [value for rows in against.values() for row in rows.values() for value in row if value is not None]
    if not known:
        return []

    def draw(figure: Figure, grid: Any) -> None:
        for column, (axes, loop) in enumerate(zip(grid[0], against, strict=True)):
            bars(axes, [title if column == 0 else "" for title in titles], against[loop], 1, "{:.2f}")
            log_scale(axes, min(0.85, min(known) / 1.1), max(known) * 1.5, "{:g}x".format)
            axes.axvline(1, color=COLOURS[RAW])
            axes.set_title(loop)
        legend(figure, names)

    caption = (
        "Median time relative to raw asyncpg, the line at 1x. Shorter is better, left of the line is faster. Log scale."
    )
    size = (1, len(against), 0.8 + 0.5 * len(titles))
    return [Heading("Relative to raw asyncpg", 3), plot("ratios", caption, size, draw)]


def distributions(run: Run) -> list[Block]:
    """Return the plots of each operation's distribution of call times, one for each loop."""
    blocks: list[Block] = []
    for loop, titles in by_loop([row for row in run["timings"] if row["times_us"]], "times_us").items():

        def draw(figure: Figure, grid: Any, titles: dict[str, Any] = titles) -> None:
            for axes, (title, row) in zip(grid.flat, titles.items(), strict=False):
                ends = [curve(axes, row[name], color=COLOURS.get(name, OTHER)) for name in row]
                log_scale(axes, min(ends)[0] * 0.95, max(end for _, end in ends) * 1.05, duration)
                axes.set_title(textwrap.fill(title, 38))
            for axes in grid.flat[len(titles) :]:
                axes.set_axis_off()
            legend(figure, contenders(run["timings"]))

        rows = -(-len(titles) // 3)
        caption = f"Cumulative share of calls on {loop} by time, up to p99. Further left is faster. Log scale."
        blocks.append(plot(f"distributions_{loop}", caption, (rows, 3, 0.5 + 1.6 * rows), draw))
    return [Heading("Distribution of call times", 3), *blocks] if blocks else []


def throughput(run: Run) -> list[Block]:
    """Return each contender's throughput."""
    found = by_loop(run["throughput"], "per_second")
    names = contenders(run["throughput"])
    titles = unique(row["title"] for row in run["throughput"])

    def draw(figure: Figure, grid: Any) -> None:
        for axes, title in zip(grid.flat, titles, strict=True):
            values = {name: [rows.get(title, {}).get(name) for rows in found.values()] for name in names}
            bars(axes, list(found), values, 0, "{:,.0f}")
            axes.margins(x=0.1)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.locator_params(axis="x", nbins=6)
            axes.set_title(title, loc="left")
        legend(figure, names)

    blocks: list[Block] = [Heading("Throughput")]
    for loop, rows in found.items():
        blocks.append(Heading(f"Operations per second on {loop}", 3))
        blocks.append(comparison(rows, names, (CHATDB, RAW), (CHATDB, SQLMODEL)))
    if not found:
        return []
    caption = (
        "Operations per second, with 16 connections for chatdb and SQLModel and one per task for raw asyncpg. Longer "
        "is better. Each panel has its own scale."
    )
    size = (len(titles), 1, 0.6 + len(titles) * (0.5 + 0.6 * len(found)))
    return [*blocks, plot("throughput", caption, size, draw)]


def growth(run: Run) -> list[Block]:
    """Return the cost of a history of 100 by table size."""
    sizes = sorted(run["growth"], key=lambda size: size["messages"])
    at = [size["messages"] for size in sizes]
    if len(sizes) < 2:
        return []

    def draw(figure: Figure, grid: Any) -> None:
        for axes, unit, fields in zip(grid[0], ("µs", "blocks"), (("p99_us", "median_us"), ("buffers",)), strict=True):
            for field, line in zip(fields, ("s--", "o-")[-len(fields) :], strict=True):
                axes.plot(at, [size[field] for size in sizes], line, color=COLOURS[CHATDB], label=field.split("_")[0])
                for size in sizes:
                    mark(axes, number(size[field]), size["messages"], size[field], (0, 7), ha="center")
            axes.set_ylim(0, max(size[field] for size in sizes for field in fields) * 1.2)
            axes.set_ylabel(unit)
            axes.grid(axis="y")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            log_scale(axes, at[0] / 2, at[-1] * 2)
            axes.set_xticks(at, [number(messages) for messages in at])
            axes.set_xlabel("messages in the table (log scale)")
        grid[0][0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)

    rows = [[number(size[field]) for field in ("messages", "median_us", "p99_us", "buffers")] for size in sizes]
    caption = "A history of 100: median and p99 (left), blocks touched (right)."
    return [
        Heading("Growth"),
        Paragraph("A history of 100 in tables of different sizes. The cost should depend on the history only."),
        Table(("Messages", "Median, µs", "p99, µs", "Blocks"), rows, left=0),
        plot("growth", caption, (1, 2, 3.2), draw),
    ]


def locality(run: Run) -> list[Block]:
    """Return how large messages are, and on how many blocks a history is."""
    rows = [(row["title"], f"{row['value']:,.1f} {row['unit']}".strip()) for row in run.get("locality", [])]
    text = "What is stored for a message, and on how many blocks a history is before and after `chatdb repack`."
    return [Heading("Storage and locality"), Paragraph(text), Table(("Figure", "Value"), rows)] if rows else []


def cold(run: Run) -> list[Block]:
    """Return the plot of the distribution of times of a history of 100 in each case."""
    places = sorted((place for place in run["places"] if place["times_ms"]), key=lambda place: place["median_ms"])
    if len(places) < 2:
        return []

    def draw(figure: Figure, grid: Any) -> None:
        axes = grid[0][0]
        axes.axvline(TARGET_MS, color=LIMIT)
        ends = []
        for rank, place in enumerate(places):
            style = {
                "color": mpl.colormaps["cividis"](rank / len(places)),
                "linestyle": ("-", "--", "-.", ":")[rank % 4],
            }
            ends.append(curve(axes, place["times_ms"], label=place["name"], **style))
        log_scale(axes, min(ends)[0] * 0.9, max(TARGET_MS, *(end for _, end in ends)) * 1.3)
        axes.set_xlabel("ms (log scale)")
        figure.legend(loc="outside right upper")

    caption = "Cumulative share of histories of 100 by time, up to p99. The red line is the target."
    return [Heading("Cold and warm"), plot("places", caption, (1, 1, 3.4), draw)]


def counts(run: Run) -> list[Block]:
    """Return what one call of each operation costs the server."""
    fields = ("statements", "round_trips", "buffers", "wal_bytes")
    rows = [(row["title"], *(number(row[field]) for field in fields)) for row in run["counts"]]
    text = "One chatdb call, counted rather than timed. Blocks are the 8 KiB shared buffers that the server touches. "
    text += "WAL is without the splits of index pages, of 4 kB each, which have a gate of their own."
    table = Table(("Operation", "Statements", "Round trips", "Blocks", "WAL, bytes"), rows)
    return [Heading("Counts"), Paragraph(text), table] if rows else []


def verdict(gate: Run) -> list[str]:
    """Return a gate's value, limit, margin as a percentage of the limit, and outcome."""
    value, limit, margin = gate["value"], gate["limit"], NONE
    if value is not None and limit:
        left = 100 * (value / limit - 1) * (-1 if gate["at_most"] else 1)
        margin = f"{round(left, 1) + 0:+.1f}"
    sign = "≤" if gate["at_most"] else "≥"
    outcome = {True: "passed", False: "**failed**", None: "not judged"}[gate["passed"]]
    return [number(value, gate["unit"]), f"{sign} {number(limit, gate['unit'])}", margin, outcome]


def gates(run: Run) -> list[Block]:
    """Return the gates, one table for each group."""
    text = "The run fails if any gate fails. The margin is a percentage of the limit; a negative margin is a miss."
    blocks: list[Block] = [Heading("Gates"), Paragraph(text)] if run["gates"] else []
    for group in unique(gate["group"] for gate in run["gates"]):
        rows = [(gate["title"], *verdict(gate)) for gate in run["gates"] if gate["group"] == group]
        blocks += [Heading(group.capitalize(), 3), Table(("Gate", "Value", "Limit", "Margin, %", "Outcome"), rows)]
    return blocks


def surroundings(run: Run) -> list[Block]:
    """Return the environment of the run, and how to read and repeat it."""
    blocks: list[Block] = []
    for title, field in (("Machine", "machine"), ("Versions", "versions"), ("Server settings", "settings")):
        rows = [(key.replace("_gib", ", GiB"), str(value)) for key, value in run[field].items()]
        blocks += [Heading(title), Table(("What", "Value"), rows, left=2)] if rows else []
    how = (
        "`nox -s bench -- --report docs/explanation` repeats the run and writes this report; `nox -s bench -- --quick` "
        "takes under 4 minutes and judges counts, plans and the target. Ratios come from one run in which the "
        "contenders take turns in rounds, so they apply to other machines; absolute times do not. A p99 compared with "
        "the target comes from the best of five rounds: chatdb's own cost is part of every round, other load on a "
        "shared machine is not. The other p99s are upper bounds. Counts have no noise."
    )
    return [*blocks, Heading("How to read and repeat the run"), Paragraph(how)]


def to_markdown(block: Block) -> str:
    """Return a block as GitHub's Markdown."""

    def escaped(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|")

    match block:
        case Heading(text, level):
            return f"{'#' * level} {escaped(text)}"
        case Paragraph(text):
            return escaped(text)
        case Plot(name, _, caption):
            return f"![{escaped(caption)}](benchmarks/{name}.svg)\n\n{escaped(caption)}"
        case Table(head, rows, left):
            marks = [":---" if column < left else "---:" for column in range(len(head))]
            return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in (head, marks, *rows))


def to_html(block: Block) -> str:
    """Return a block as HTML."""

    def marked(text: str) -> str:
        text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)

    match block:
        case Heading(text, level):
            return f"<h{level}>{marked(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{marked(text)}</p>"
        case Plot(_, svg, caption):
            svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
            return f'<figure><div class="wide">{svg}</div><figcaption>{marked(caption)}</figcaption></figure>'
        case Table(head, rows, left):
            lines = []
            for tag, line in (("th", head), *(("td", row) for row in rows)):
                cells = (f"<{tag}{' class=left' * (n < left)}>{marked(cell)}</{tag}>" for n, cell in enumerate(line))
                lines.append(f"<tr>{''.join(cells)}</tr>\n")
            return f'<div class="wide"><table>\n{"".join(lines)}</table></div>'


def write(run: Run, folder: Path) -> None:
    """Write benchmarks.md, benchmarks.html and benchmarks/*.svg into a folder, and delete older plots there."""
    parts = (summary, target, operations, throughput, growth, locality, cold, counts, gates, surroundings)
    blocks = [block for part in parts for block in part(run)]
    plots = folder / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for block in blocks:
        if isinstance(block, Plot):
            (plots / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    (folder / "benchmarks.md").write_text("\n\n".join(map(to_markdown, blocks)) + "\n", encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>chatdb: benchmarks</title>\n<style>\n{PAGE}</style>"
    body = "\n".join(map(to_html, blocks))
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    (folder / "benchmarks.html").write_text(page, encoding="utf-8")


def main() -> None:
    """Write the report of a run from its JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("run", type=Path, help="JSON file with the figures")
    parser.add_argument("folder", type=Path, help="folder for the report")
    arguments = parser.parse_args()
    write(json.loads(arguments.run.read_text(encoding="utf-8")), arguments.folder)


if __name__ == "__main__":
    main()
