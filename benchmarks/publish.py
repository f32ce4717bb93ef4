"""``python -m benchmarks.publish``: sending runs of a registered function beside sending those of a plain task."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import stage
from benchmarks.report import Benchmark, Figure, Report, at_least, median, run, spread


def rates(
    ways: dict[str, Callable[[int], None]], count: int, rounds: int, flush: Callable[[], None]
) -> dict[str, list[float]]:
    """Messages a second by each way, in alternating rounds in this process."""
    for send in ways.values():
        send(min(count, 200))  # opens connections, fills caches
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            flush()
            began = time.perf_counter()
            ways[name](count)
            found[name].append(count / (time.perf_counter() - began))
    return found


def each(send: Callable[[int], Any]) -> Callable[[int], None]:
    """Send so many by calling ``send`` with 0, 1, 2, ..."""

    def many(count: int) -> None:
        for number in range(count):
            send(number)

    return many


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--messages", type=int, help="messages of each way in a round (200)")
    parser.add_argument("--rounds", type=int, help="rounds (51)")


def measure(options: argparse.Namespace) -> Report:
    """Measure all ways to send."""
    count = options.messages or (50 if options.quick else 200)
    rounds = options.rounds or (1 if options.quick else 51)
    with stage.project() as project:
        app = project.app
        plain, recorded = app.tasks["plain"], app.tasks["recorded"]

        def plain_batch(count: int) -> None:
            with app.producer_or_acquire() as producer, producer.batch(max_size=500):
                for number in range(count):
                    plain.apply_async((number,), producer=producer)

        ways: dict[str, Callable[[int], None]] = {
            "plain .delay": each(plain.delay),
            "registered .delay": each(recorded.delay),
            "plain .apply_async": each(lambda number: plain.apply_async((number,))),
            "registered .apply_async": each(lambda number: recorded.apply_async((number,))),
            "plain in kombu's batch": plain_batch,
            "registered .map_delay": lambda count: recorded.map_delay(range(count)),
        }
        found = rates(ways, count, rounds, project.broker.flush)
    return Report(
        name="publish",
        about=(
            f"One process, Valkey on a unix socket, results on: {rounds} alternating rounds of {count:,} messages. "
            "A ratio is the median of the rounds' ratios."
        ),
        figures=figures_of(found),
    )


def figures_of(found: dict[str, list[float]]) -> list[Figure]:
    """The rates and their ratios."""

    def ratio(ours: str, theirs: str) -> list[float]:
        return [mine / plain for mine, plain in zip(found[ours], found[theirs], strict=True)]

    delay = ratio("registered .delay", "plain .delay")
    general = ratio("registered .apply_async", "plain .apply_async")
    bulk = ratio("registered .map_delay", "plain .delay")
    return [
        *(Figure(name=name, value=median(values), unit="/s", beside=spread(values)) for name, values in found.items()),
        at_least(0.95, ".delay, registered / plain", median(delay), "", spread(delay, 2)),
        Figure(name=".apply_async, registered / plain", value=median(general), unit="", beside=spread(general, 2)),
        Figure(name=".map_delay / plain .delay", value=median(bulk), unit="", beside=spread(bulk, 2)),
    ]


BENCHMARK = Benchmark(
    name="publish",
    about="sending runs of a registered function beside sending those of a plain task",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
