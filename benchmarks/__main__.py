"""``python -m benchmarks all``: every measurement; ``python -m benchmarks beat`` one of them."""

from __future__ import annotations

import argparse

from benchmarks import (
    beat,
    burst,
    dev,
    faults,
    grid,
    history,
    imports,
    kills,
    ledger,
    publish,
    report,
    scale,
    transport,
    workers,
)

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (imports, transport, publish, dev, ledger, history, beat, burst, grid, kills, faults, scale, workers)
}


def main() -> None:
    """Run the chosen ones, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="+", choices=["all", *BENCHMARKS], metavar="name", help=", ".join(["all", *BENCHMARKS])
    )
    report.add_common_options(parser)
    options = parser.parse_args()
    reports = []
    for name in BENCHMARKS if "all" in options.names else options.names:
        flags = ["--quick"] if options.quick else []
        reports.append(report.taken(BENCHMARKS[name], report.parser_of(BENCHMARKS[name]).parse_args(flags)))
    report.show(reports, options, f"benchmarks {' '.join([*options.names, *(['--quick'] if options.quick else [])])}")


if __name__ == "__main__":
    main()
