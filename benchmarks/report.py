"""What a benchmark says: figures with what stands beside them, as a table for people or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    #: Absolute figures, spread, or what it was compared with.
    beside: str = ""
    #: The bound in words, and whether the number keeps it; empty and None where there is none.
    target: str = ""
    met: bool | None = None


def below(limit: float, name: str, value: float, unit: str, beside: str = "") -> Figure:
    """A figure that is to stay under ``limit``."""
    return Figure(
        name=name, value=value, unit=unit, beside=beside, target=f"< {limit:g} {unit}".strip(), met=value < limit
    )


def at_least(limit: float, name: str, value: float, unit: str, beside: str = "") -> Figure:
    """A figure that is to reach ``limit``."""
    return Figure(
        name=name, value=value, unit=unit, beside=beside, target=f">= {limit:g} {unit}".strip(), met=value >= limit
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one benchmark found."""

    name: str
    #: What was done, in a sentence or two.
    about: str
    figures: list[Figure]
    #: What is compared with each other: a row of titles, then rows of text.
    table: list[list[str]] = field(default_factory=list)
    #: Further tables by their titles.
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    #: Anything that explains the figures, one line each.
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A measurement that can be started from the command line."""

    name: str
    #: First paragraph of ``--help``.
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Report]


def parser_of(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.about)
    benchmark.add_options(parser)
    add_common_options(parser)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, the figures say little")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")


def run(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """Measure and print, as the command line says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser_of(benchmark).parse_args(arguments)
    # Where the tables went is no part of how they came about.
    pairs = zip([None, *arguments], arguments, strict=False)
    said = [part for before, part in pairs if "--markdown" not in (before, part) and part != "--json"]
    show([taken(benchmark, options)], options, shlex.join([f"benchmarks.{benchmark.name}", *said]))


def taken(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """A report with what the machine was doing around it."""
    before, began = os.getloadavg()[0], time.monotonic()
    report = benchmark.measure(options)
    return {
        **asdict(report),
        "seconds": round(time.monotonic() - began, 1),
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def show(reports: list[dict[str, Any]], options: argparse.Namespace, command: str) -> None:
    """Print reports as the options say, and keep them where these name a file."""
    if options.markdown is not None:
        kept = f"# Results\n\nCommand: `python -m {command}`. {text_of(reports)}"
        options.markdown.write_text(kept, "utf-8")
    if options.json:
        print(json.dumps({"machine": machine(), "reports": reports}, indent=2))
    else:
        print(text_of(reports))
    sys.stdout.flush()


def text_of(reports: list[dict[str, Any]]) -> str:
    """Reports as Markdown that reads well in a terminal."""
    parts = ["Machine: " + "; ".join(f"{key} {value}" for key, value in machine().items()) + "."]
    for report in reports:
        rows = [["", "figure", "target", "met", "beside it"]]
        for item in report["figures"]:
            met = {True: "yes", False: "NO", None: ""}[item["met"]]
            rows.append(
                [item["name"], f"{_number(item['value'])} {item['unit']}".strip(), item["target"], met, item["beside"]]
            )
        load = f"load average {report['load_before']} before, {report['load_after']} after; {report['seconds']} s"
        notes = "".join(f"\n- {note}" for note in report["notes"])
        tables = "\n\n".join(
            [
                *(_table(each) for each in [report["table"]] if len(each) > 1),
                *(f"{title}\n\n{_table(each)}" for title, each in report["tables"].items()),
                *(_table(each) for each in [rows] if len(each) > 1),
            ]
        )
        parts.append(
            f"## {report['name']}\n\n{report['about']} ({load}.)\n\n{tables}" + (f"\n{notes}" if notes else "")
        )
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("celery", "kombu", "redis", "sqlalchemy")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def median(values: Iterable[float]) -> float:
    """The median; 0 of nothing."""
    found = list(values)
    return statistics.median(found) if found else 0.0


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` of all values lie; 0 of nothing."""
    found = sorted(values)
    return found[min(len(found) - 1, int(len(found) * share))] if found else 0.0


def spread(values: Iterable[float], digits: int = 0) -> str:
    """The range of some rounds, in words."""
    found = list(values)
    return f"{min(found):.{digits}f} to {max(found):.{digits}f} in {len(found)} rounds"
