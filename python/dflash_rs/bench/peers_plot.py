"""The picture of a run of the suite of peers: speed-up by kind of text for every arm, and what is left of it with more requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dflash_rs.bench import report
from dflash_rs.bench.runner import FOREIGN, PLAIN, TRANSFORMERS, Row
from dflash_rs.bench.workloads import ALL
from dflash_rs.errors import DflashError

# Ours in colours that stand apart in grey, too; others in greys.
_OURS = ("#2563a8", "#6aa5dd", "#d1741f", "#3a8a4d", "#7a4fa3", "#a33b3b", "#6b8e23", "#c2185b")
_THEIRS = ("#555555", "#8a8a8a", "#bdbdbd")


def _name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}, seeded"


def plot_peers(path: str, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draws into `path` (format by its suffix): a panel for each temperature, and a second line of panels where there are several numbers of
    requests. Whiskers are quartiles over the rounds; tau in the legend is that over all texts, for each temperature."""
    report.need_matplotlib(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row.mode != PLAIN]
    if not drawn:
        raise DflashError("--plot: there is no row beside plain decoding to draw")
    arms = list(dict.fromkeys(row.mode for row in drawn))
    ours, theirs = [a for a in arms if a not in FOREIGN], [a for a in arms if a in FOREIGN]
    # In the order in which arms are drawn.
    colours = dict(zip(ours, _OURS * len(ours))) | dict(zip(theirs, _THEIRS))
    arms = list(colours)
    temperatures = sorted({row.temperature for row in drawn})
    levels = sorted({row.concurrency for row in drawn})
    categories = [kind for kind in dict.fromkeys(row.category or ALL for row in drawn) if kind != ALL]
    # All of them together come first, unless there is but one kind.
    kinds = [ALL, *categories] if any((row.category or ALL) == ALL for row in drawn) else categories
    whole = kinds[0]
    lines = 1 + (len(levels) > 1)
    width = max(4.2, 0.16 * len(arms) * len(kinds) + 1.6)
    figure, axes = plt.subplots(
        lines, len(temperatures), figsize=(width * len(temperatures), 3.5 * lines), squeeze=False
    )
    at: At = {(row.mode, row.concurrency, row.temperature, row.category or ALL): row for row in drawn}
    top = 1.15 * max([1.0, *(max(row.speedup, *(row.speedup_quartiles or [0.0])) for row in drawn)])
    requests = f"{levels[0]} request{'s' if levels[0] > 1 else ''} at once"
    for column, temperature in enumerate(temperatures):
        _draw_kinds(axes[0][column], at, levels[0], temperature, kinds, colours, top)
        axes[0][column].set(title=f"{_name(temperature)}, {requests}", ylim=(0, top))
        if lines > 1:
            _draw_levels(axes[1][column], at, levels, temperature, whole, colours)
            axes[1][column].set(xlabel="requests at once", title=f"{_name(temperature)}, {whole}", ylim=(0, top))
    for line in axes:
        line[0].set_ylabel("tokens/s over plain decoding")
        for axis in line:
            axis.axhline(1, color="#222222", linewidth=1, linestyle="--")
            axis.spines[["top", "right"]].set_visible(False)
            axis.title.set_fontsize(9)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.set_layout_engine("constrained")
    told = ", ".join("greedy" if one == 0 else f"T={one:g}" for one in temperatures)
    names = {arm: _legend(arm, at, levels[0], temperatures, whole) for arm in arms if arm in handles}
    _add_legend(figure, [handles[arm] for arm in names], [*names.values()], f"tau: tokens per pass, {told}, {requests}")
    differs = any(row.identical_to_plain is False for row in drawn if row.mode not in FOREIGN)
    said = "texts differ" if differs else "the text of plain decoding in every row of ours"
    title = figure.suptitle(f"{report.machine(head)}; {said}", **_SMALL, color="#555555")
    if title.get_window_extent().width > figure.bbox.width:
        title.set_text(f"{report.machine(head)}\n{said}")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DflashError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)


# Rows by arm, requests at once, temperature and kind of text.
At = dict[tuple[str, int, float, str], Row]


def _draw_kinds(
    axis: Any, at: At, level: int, temperature: float, kinds: Sequence[str], colours: dict[str, str], top: float
) -> None:
    """A group of bars for each kind of text, a bar for each arm."""
    bar = 0.84 / len(colours)
    for i, (arm, colour) in enumerate(colours.items()):
        mine = [(k, at.get((arm, level, temperature, kind))) for k, kind in enumerate(kinds)]
        there = [(k, row) for k, row in mine if row is not None]
        if not there:
            continue
        xs = [k + (i - (len(colours) - 1) / 2) * bar for k, _ in there]
        heights = [row.speedup for _, row in there]
        whiskers = _whiskers([row for _, row in there])
        axis.bar(xs, heights, bar * 0.9, color=colour, label=arm, yerr=whiskers, **_WHISKER)
        for x, (_, row) in zip(xs, there):
            _, high = row.speedup_quartiles or [row.speedup] * 2
            axis.text(
                x,
                high + 0.012 * top,
                f"{row.speedup:.2f}",
                ha="center",
                va="bottom",
                fontsize=6,
                rotation=90,
                **report.legible(),
            )
    axis.set_xticks(range(len(kinds)), kinds)


def _draw_levels(
    axis: Any, at: At, levels: Sequence[int], temperature: float, kind: str, colours: dict[str, str]
) -> None:
    """A line for each arm over the requests at once."""
    for arm, colour in colours.items():
        measured = [x for x, level in enumerate(levels) if (arm, level, temperature, kind) in at]
        if measured:
            points = [at[arm, levels[x], temperature, kind] for x in measured]
            axis.errorbar(
                measured, [row.speedup for row in points], yerr=_whiskers(points), color=colour, label=arm, marker="o", markersize=4,
                linewidth=1.6, elinewidth=0.8, capsize=2,
            )  # fmt: skip
    axis.set_xticks(range(len(levels)), [str(level) for level in levels])


_WHISKER: dict[str, Any] = {"error_kw": {"elinewidth": 0.8, "ecolor": "#222222"}}


def _whiskers(rows: Sequence[Row]) -> list[list[float]]:
    each = [row.speedup_quartiles or [row.speedup] * 2 for row in rows]
    low = [max(0.0, row.speedup - pair[0]) for row, pair in zip(rows, each)]
    return [low, [max(0.0, pair[1] - row.speedup) for row, pair in zip(rows, each)]]


def _legend(arm: str, at: At, level: int, temperatures: Sequence[float], kind: str) -> str:
    """With tau at each temperature where anything is drafted: where nothing is, it is 1 by definition."""
    taus = [row.tau if (row := at.get((arm, level, one, kind))) is not None else None for one in temperatures]
    if arm == TRANSFORMERS or not any(taus):
        return arm
    return f"{arm} (tau {', '.join('-' if tau is None else f'{tau:.2f}' for tau in taus)})"


_SMALL: dict[str, Any] = {"fontsize": 8}


def _add_legend(figure: Any, handles: Sequence[Any], names: Sequence[str], title: str) -> None:
    """A legend below the panels, of as many columns as the figure has room for, which gets its lines on top of its own height."""
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, title=title, title_fontsize=8, **_SMALL
        )  # fmt: skip
        extent = legend.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            width, height = figure.get_size_inches()
            figure.set_size_inches(max(width, extent.width / figure.dpi), height + extent.height / figure.dpi)
            return
        legend.remove()
