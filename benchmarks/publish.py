"""``python -m benchmarks.publish``: sending runs of a registered function beside a plain task's; saving Tasks."""

from __future__ import annotations

import argparse
import asyncio
import base64
import time
import uuid
from collections.abc import Callable
from typing import Any

from kombu.utils.json import dumps

from benchmarks import stage
from benchmarks.report import Benchmark, Figure, Report, at_least, below, median, run, spread
from llmtasks import Task
from llmtasks.dispatch import station
from llmtasks.store.rows import schedules


def rates(
    ways: dict[str, Callable[[int], None]],
    count: int,
    rounds: int,
    flush: Callable[[], None],
    cpu: dict[str, list[float]],
) -> dict[str, list[float]]:
    """Messages a second by each way, in alternating rounds in this process; ``cpu`` gets its microseconds of each."""
    for send in ways.values():
        send(min(count, 200))  # opens connections, fills caches
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            flush()
            began, used = time.perf_counter(), time.process_time()
            ways[name](count)
            found[name].append(count / (time.perf_counter() - began))
            cpu.setdefault(name, []).append((time.process_time() - used) / count * 1_000_000)
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
    parser.add_argument("--bulk", type=int, help="messages of each way to send many, and rows, in a round (2,000)")


def measure(options: argparse.Namespace) -> Report:
    """Measure all ways to send and to save."""
    count = options.messages or (50 if options.quick else 200)
    rounds = options.rounds or (1 if options.quick else 51)
    bulk = options.bulk or (100 if options.quick else 2_000)
    few = max(1, rounds // 5)
    with stage.project() as project:
        app = project.app
        plain, recorded = app.tasks["plain"], app.tasks["recorded"]

        def plain_batch(count: int) -> None:
            with app.producer_or_acquire() as producer, producer.batch(max_size=500):
                for number in range(count):
                    plain.apply_async((number,), producer=producer)

        def map_delay(count: int) -> None:
            recorded.map_delay(range(count))

        def map_delay_without_events(count: int) -> None:
            app.conf.task_send_sent_event = False
            map_delay(count)
            app.conf.task_send_sent_event = True

        one: dict[str, Callable[[int], None]] = {
            "plain .delay": each(plain.delay),
            "registered .delay": each(recorded.delay),
            "plain .apply_async": each(lambda number: plain.apply_async((number,))),
            "registered .apply_async": each(lambda number: recorded.apply_async((number,))),
        }
        many: dict[str, Callable[[int], None]] = {
            "plain in kombu's batch": plain_batch,
            "registered .map_delay": map_delay,
            "registered .map_delay, no events": map_delay_without_events,
            "as_task_v2 and LPUSH of 500 by hand, no events": lambda count: by_hand(app, count),
        }
        saving: dict[str, Callable[[int], None]] = {
            "Task.save_sync": lambda count: save(count, Task.save_sync),
            "Task.save_many_sync": lambda count: save(count),
        }
        station().database.migrate()
        cpu: dict[str, list[float]] = {}
        found = rates(one, count, rounds, project.broker.flush, cpu)
        found |= rates(many, bulk, few, project.broker.flush, cpu)
        found |= rates(saving, bulk // 4, max(1, rounds // 10), forget_schedules, cpu)
        held_up = [asyncio.run(lag_of(recorded)) for _ in range(few)]
    return Report(
        name="publish",
        about=(
            f"One process, Valkey on a unix socket, results and task-sent events on: {rounds} alternating rounds of "
            f"{count:,} messages, {few} of {bulk:,} for the ways to send many, SQLite for the rows. A ratio is the "
            "median of the rounds' ratios."
        ),
        figures=figures_of(found, cpu, held_up),
    )


def by_hand(app: Any, count: int) -> None:
    """The least that many messages take: no signals, no events, no handles, nothing looked up."""
    with app.producer_or_acquire() as producer:
        for begin in range(0, count, 500):
            texts = [hand_made(app, number) for number in range(begin, min(count, begin + 500))]
            producer.channel.client.lpush("celery", *texts)


def hand_made(app: Any, number: int) -> str:
    """A message as kombu's Redis transport keeps it."""
    run_id = str(uuid.uuid4())
    made = app.amqp.as_task_v2(run_id, "plain", (number,), {}, origin="hand")
    properties = {
        **made.properties, "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "celery"},
        "priority": 0, "body_encoding": "base64", "delivery_tag": str(uuid.uuid4()),
    }  # fmt: skip
    return str(
        dumps(
            {
                "body": base64.b64encode(dumps(made.body).encode()).decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": made.headers,
                "properties": properties,
            }
        )
    )


def save(count: int, store: Callable[[Task], Any] | None = None) -> None:
    """Save so many new Tasks, one by one or together."""
    tasks = [Task(func_name="recorded", name=f"task {number}", interval_minutes=60) for number in range(count)]
    if store is None:
        Task.save_many_sync(tasks)
        return
    for task in tasks:
        store(task)


def forget_schedules() -> None:
    """Empty their table."""
    with station().database.transaction() as tx:
        tx.execute(schedules.delete())


async def lag_of(task: Any) -> float:
    """Seconds by which an event loop was late at worst while it sent 200 runs at a time."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - began - 0.001)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    await asyncio.gather(*(task.adelay(number) for number in range(200)))
    ticker.cancel()
    return max(late)


def figures_of(found: dict[str, list[float]], cpu: dict[str, list[float]], held_up: list[float]) -> list[Figure]:
    """The rates and their ratios."""

    def ratio(ours: str, theirs: str) -> list[float]:
        return [mine / plain for mine, plain in zip(found[ours], found[theirs], strict=True)]

    def shown(name: str, values: list[float]) -> Figure:
        return Figure(name=name, value=median(values), unit="", beside=spread(values, 2))

    delay = ratio("registered .delay", "plain .delay")
    bulk = found["registered .map_delay"]
    return [
        *(
            Figure(
                name=name, value=median(values), unit="/s",
                beside=f"{spread(values)}; {median(cpu[name]):.0f} us of CPU each, at best {min(cpu[name]):.0f}",
            )
            for name, values in found.items()
        ),
        at_least(1.3, ".delay, registered / plain", median(delay), "", spread(delay, 2)),
        shown(".apply_async, registered / plain", ratio("registered .apply_async", "plain .apply_async")),
        at_least(16_000, ".map_delay, best round", max(bulk), "/s"),
        shown(".map_delay / kombu's batch", ratio("registered .map_delay", "plain in kombu's batch")),
        shown(
            ".map_delay / by hand, both without events",
            ratio("registered .map_delay, no events", "as_task_v2 and LPUSH of 500 by hand, no events"),
        ),
        shown("save_many / save, rows a second", ratio("Task.save_many_sync", "Task.save_sync")),
        below(
            5, "200 adelay at once: the event loop was late by at most", min(held_up) * 1000, "ms",
            f"best round; median {median(held_up) * 1000:.1f} ms in {len(held_up)} rounds",
        ),
    ]  # fmt: skip


BENCHMARK = Benchmark(
    name="publish",
    about="sending runs of a registered function beside sending those of a plain task; saving Tasks",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
