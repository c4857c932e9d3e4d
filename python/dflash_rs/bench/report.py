"""What a benchmark says: a table for people, JSON for programs, a picture for the README."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from dflash_rs import extras
from dflash_rs.arguments import shown_path
from dflash_rs.bench.runner import BESIDE, FOREIGN, PLAIN, REFERENCE, Row
from dflash_rs.config import LOOKUP
from dflash_rs.errors import DflashError, InvalidArgument

REPEATS_ITSELF = 0.30
# With a smaller share of a block drafted tau tells of the planner, not of the drafter.
HARDLY_DRAFTED = 0.25


def header(argv: Sequence[str], llm: Any = None) -> dict[str, Any]:
    """Where and how the numbers came about: without this a number is a rumour."""
    info: dict[str, Any] = {
        "command": shlex.join(["dflash-rs", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "dflash_rs": version("dflash-rs"),
        "git_commit": git_commit(Path(__file__).resolve().parent) or git_commit(Path.cwd()),
    }
    for package in ("torch", "transformers", "numpy"):
        info[package] = version(package)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        info["threads"] = torch.get_num_threads()
        info["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if llm is not None:
        info["device"] = str(getattr(llm, "device", "cpu"))
        info["dtype"] = str(getattr(llm, "dtype", "")).removeprefix("torch.")
        info["matmul_precision"] = getattr(llm, "matmul_precision", None)
        info["block_size"] = getattr(llm, "block_size", None)
        info["tree_nodes"] = getattr(llm, "tree_nodes", None)
        info["lookup"] = getattr(llm, "lookup", None)
    return info


def machine(head: dict[str, Any]) -> str:
    """What was computed on and with, in words."""
    words = [head.get("gpu") if str(head.get("device")).startswith("cuda") else head.get("cpu")]
    words += [f"{head.get('cpus', '?')} cores", f"{head.get('threads', '?')} threads", head.get("dtype")]
    words.append("products of bfloat16" if head.get("matmul_precision") == "medium" else None)
    return ", ".join(word for word in words if word)


def version(package: str) -> str | None:
    """The installed version of a package, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Cores this process may run on, which in a container is less than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, which on a machine of one's own is this one; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, marked when there are changes; None outside a repository of ours."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if not (root / "python" / "dflash_rs").is_dir():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


COLUMNS = (
    ("arm", lambda row: row.mode),
    ("batch", lambda row: str(row.concurrency)),
    ("sampling", lambda row: "greedy" if row.temperature == 0 else f"T={row.temperature:g} seeded"),
    ("tokens/s", lambda row: f"{row.tokens_per_s:.1f}"),
    ("speed-up", lambda row: f"{row.speedup:.2f}x"),
    ("tau", lambda row: f"{row.tau:.2f}"),
    ("n-gram tau", lambda row: f"{row.ngram_tau:.2f}"),
    ("repeated 4-grams", lambda row: f"{row.repeated_4gram_share:.0%}"),
    ("same text", lambda row: _same(row)),
)
# Where rows have them.
CATEGORY = ("category", lambda row: row.category or "")
QUARTILES = ("quartiles", lambda row: " to ".join(f"{value:.2f}" for value in row.speedup_quartiles))


def _same(row: Row) -> str:
    # Texts of an engine that draws otherwise cannot be compared.
    if row.mode == PLAIN or row.identical_to_plain is None:
        return "-"
    return ("yes" if row.identical_to_plain else "NO ") + f" {row.identical}"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    columns = list(COLUMNS)
    if any(row.speedup_quartiles for row in rows):
        columns.insert(1 + [name for name, _ in columns].index("speed-up"), QUARTILES)
    if any(row.category for row in rows):
        columns.insert(1, CATEGORY)
    cells = [[name for name, _ in columns]] + [[render(row) for _, render in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader should not have to find out alone: differences, loops, drafts that were not made, a drafter that a look-up beats."""
    lines = []
    for row in rows:
        where = f"{row.mode}, batch {row.concurrency}, {COLUMNS[2][1](row)}"
        for one in row.divergences:
            place = f"prompt {one.prompt + 1}" + (f" ({one.source})" if one.source else "")
            gap = "unknown" if one.logit_gap is None else f"{one.logit_gap:+.2e}"
            lines.append(
                f"{where}: {place} differs at token {one.position}: {one.plain_token} became {one.other_token}, "
                f"logit gap {gap}"
            )
        if row.mode != PLAIN and row.repeated_4gram_share > REPEATS_ITSELF:
            lines.append(
                f"{where}: {row.repeated_4gram_share:.0%} of the 4-grams repeat; tau on text that loops says little"
            )
        drafted = row.drafts_per_pass
        if row.mode in (PLAIN, LOOKUP) or row.mode in FOREIGN or row.mode.endswith(BESIDE):
            # What is not found is not drafted, and its tau is a look-up's anyway, or in part.
            pass
        elif drafted is not None and drafted < HARDLY_DRAFTED * (row.most_drafts or 0):
            why = "it was not expected to pay"
            if row.block_cost is not None:
                why += f": by what steps took, one with a whole block costs {row.block_cost:.2f} plain ones here"
            lines.append(
                f"{where}: {drafted:.1f} of {row.most_drafts} drafts were made per pass, since {why}; this tau says little of the "
                "drafter (--no-adaptive drafts whatever it costs)"
            )
        elif row.ngram_tau >= row.tau:
            lines.append(f"{where}: a look-up drafter would reach tau {row.ngram_tau:.2f}, the drafter {row.tau:.2f}")
        if row.vs_reference is not None:
            lines.append(f"{where}: {row.vs_reference:.2f}x the tokens/s of the {REFERENCE} loop in the same run")
    return lines


def profile_table(rows: Sequence[Row]) -> str:
    """Milliseconds per step and share of each stage."""
    lines = []
    for row in rows:
        if not row.stage_seconds or not row.engine_steps:
            continue
        total = sum(row.stage_seconds.values())
        lines.append(
            f"{row.mode}, batch {row.concurrency}, {COLUMNS[2][1](row)}: "
            f"{row.engine_steps:.0f} steps of {1000 * total / row.engine_steps:.2f} ms"
        )
        for stage, seconds in sorted(row.stage_seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {stage:<8} {1000 * seconds / row.engine_steps:8.3f} ms  {seconds / total:6.1%}")
    return "\n".join(lines)


def write_json(path: str, head: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    """Writes {"header": ..., "rows": [...]} to `path`, `-` being standard output. `more` are keys beside these two."""
    text = json.dumps({"header": head, "rows": [row.to_json() for row in rows], **more}, indent=2, allow_nan=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DflashError(f"--json {path}: {error.strerror or error}") from None


def read_json(path: str) -> tuple[dict[str, Any], list[Row]]:
    """The header and rows of a file written by `write_json`."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    names = {one.name for one in fields(Row)}
    return data["header"], [Row(**{k: v for k, v in row.items() if k in names}) for row in data["rows"]]


def need_place(option: str, path: str) -> None:
    """Raises before a long run rather than after it when no file can be written there. Makes nothing, no folder either."""
    place = Path(path)
    try:
        there = place.exists()
        free = not place.is_dir() and place.parent.is_dir() and os.access(place if there else place.parent, os.W_OK)
    except OSError:  # a name too long, a link to itself
        free = False
    if not free:
        raise InvalidArgument(
            f"{option}: got {shown_path(path)}, expected a file that can be written, in a folder that exists"
        )


def need_matplotlib(path: str) -> None:
    """Raises before a long run rather than after it when there is no matplotlib, or it writes no such files."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DflashError(f"--plot needs matplotlib: {extras.install('bench')}")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if (kind := Path(path).suffix.lower()) and kind[1:] not in kinds:
        raise InvalidArgument(
            f"--plot: got {path}, expected a file name that ends in one of {', '.join(sorted(kinds))}"
        )


def legible() -> dict[str, Any]:
    """How a label is drawn that lines may run behind: each letter hides what is next to it."""
    from matplotlib.patheffects import withStroke

    return {"path_effects": [withStroke(linewidth=2.5, foreground="white")]}


def plot(path: str, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draws speed-up over concurrency and the acceptance histogram into `path` (format by its suffix)."""
    need_matplotlib(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row.mode not in (PLAIN, REFERENCE)]
    if not drawn:
        raise DflashError("--plot: there is no drafted row to draw")
    modes = list(dict.fromkeys(row.mode for row in drawn))
    settings = sorted({(modes.index(row.mode), row.temperature) for row in drawn})
    colours = dict(
        zip(settings, ("#2563a8", "#d1741f", "#3a8a4d", "#7a4fa3", "#a33b3b", "#6b8e23", "#c2185b", "#455a64"))
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")

    levels = sorted({row.concurrency for row in drawn})
    place = {level: i for i, level in enumerate(levels)}
    width = 0.8 / len(settings)
    for i, (mode, temperature) in enumerate(settings):
        name = "greedy" if temperature == 0 else f"T={temperature:g}, seeded"
        if len(modes) > 1:
            name = f"{modes[mode]}, {name}"
        mine = [row for row in drawn if (row.mode, row.temperature) == (modes[mode], temperature)]
        xs = [place[row.concurrency] + (i - (len(settings) - 1) / 2) * width for row in mine]
        bars = left.bar(
            xs, [row.speedup for row in mine], width * 0.92, color=colours.get((mode, temperature)), label=name
        )
        left.bar_label(bars, [f"{row.speedup:.2f}x" for row in mine], padding=2, fontsize=8, **legible())
        # One histogram per setting, from the smallest batch: the drafts do not depend on the batch.
        counts = mine[0].accept_histogram
        total = sum(counts)
        if total:
            xs = [k + (i - (len(settings) - 1) / 2) * width for k in range(len(counts))]
            right.bar(
                xs,
                [100 * count / total for count in counts],
                width * 0.92,
                color=colours.get((mode, temperature)),
                label=f"{name}: tau {mine[0].tau:.2f} (look-up {mine[0].ngram_tau:.2f})",
            )
    title = "Speed-up, same text" if all(row.identical_to_plain for row in drawn) else "Speed-up (texts differ)"
    left.axhline(1, color="#555555", linewidth=1, linestyle="--", label="plain decoding")
    left.set_xticks(range(len(levels)), [str(level) for level in levels])
    left.set_ylim(0, max(1.0, max(row.speedup for row in drawn)) * 1.25)
    left.set(xlabel="requests at once", ylabel="tokens/s over plain", title=title)
    right.set(xlabel="drafts accepted in one pass", ylabel="% of passes", title="Acceptance")
    right.set_xticks(range(max((len(row.accept_histogram) for row in drawn), default=1)))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper right")
    figure.suptitle(
        machine(head),
        fontsize=8,
        color="#555555",
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DflashError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)
