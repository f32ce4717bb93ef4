"""``python -m benchmarks.ledger``: what recording a run costs the worker, and what the store alone costs."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery import Celery
from sqlalchemy import func, select

from benchmarks import stage
from benchmarks.report import Benchmark, Figure, Report, below, median, run, spread
from llmtasks import bridge
from llmtasks.bridge import Body
from llmtasks.states import RunState
from llmtasks.store import claims, ends, groups, held
from llmtasks.store.claims import Offer
from llmtasks.store.database import Database
from llmtasks.store.ends import End
from llmtasks.store.held import Delivered
from llmtasks.store.rows import runs
from tests.processes import Project
from tests.waiting import wait_until

#: Task functions with the same empty body, and what each of them is.
KINDS = {
    "plain": "plain shared_task",
    "plain_alike": "the same with acks_late and time limits",
    "recorded": "registered, sync",
    "recorded_async": "registered, async",
}


def worker_cost(project: Project, database: Database, count: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Microseconds of worker CPU a run for each kind of task, in alternating rounds; and of a second of idling."""
    worker = project.worker(concurrency=1)
    app = project.app

    def spent(name: str, number: int) -> float:
        before = stage.cpu_seconds(worker)
        drain(app, name, number)
        return 1e6 * (stage.cpu_seconds(worker) - before) / number

    for name in KINDS:
        spent(name, min(count, 100))  # opens connections, imports what is imported late
    costs: dict[str, list[float]] = {name: [] for name in KINDS}
    for number in range(rounds):
        for name in list(KINDS) if number % 2 == 0 else reversed(KINDS):
            costs[name].append(spent(name, count))
    before, began = stage.cpu_seconds(worker), time.monotonic()
    time.sleep(5.0 if rounds > 1 else 1.0)
    idle = 1e6 * (stage.cpu_seconds(worker) - before) / (time.monotonic() - began)
    worker.terminate()
    with database.reading() as connection:
        query = select(func.count()).where(runs.c.state == RunState.SUCCEEDED, runs.c.func_name == "recorded")
        recorded = connection.execute(query).scalar_one()
    assert recorded == min(count, 100) + count * rounds, f"{recorded} runs are in the ledger"
    return costs, idle


def drain(app: Celery, name: str, number: int) -> None:
    """Send ``number`` runs at once and wait for the last result; one worker child works them off in their order."""
    task = app.tasks[name]
    with app.producer_or_acquire() as producer, producer.batch(max_size=500):
        for _ in range(number):
            last = task.apply_async(producer=producer)
    wait_until(lambda: last.state == "SUCCESS", 300, f"{number} runs of {name}", interval=0.02)


def store_cost(database: Database, count: int) -> tuple[float, float]:
    """Microseconds of CPU and of time for claim and end, a statement each, and ``delivered`` in groups of 50."""
    began, used = time.perf_counter(), time.process_time()
    told: list[Delivered] = []
    for number in range(count):
        offer = _offer()
        now = database.now()
        with database.lone() as lone:
            claim = claims.claim_slotless(lone, offer, now, now - timedelta(seconds=12))
        assert claim is not None
        how = End(state=RunState.SUCCEEDED, keeps_owner=True, result="null", run_seconds=0.0)
        with database.lone() as lone:
            assert ends.end_lone(lone, claim, how, database.now())
        told.append(Delivered(run_id=claim.id, claim=claim.claim_no, keep=10_000))
        if len(told) == 50 or number == count - 1:
            with database.transaction() as tx:
                held.mark_delivered(tx, told)
            told = []
    return 1e6 * (time.process_time() - used) / count, 1e6 * (time.perf_counter() - began) / count


def grouped_cost(database: Database, count: int) -> tuple[float, float]:
    """The same in groups of 50, as the asyncio pool's writer writes them."""
    began, used = time.perf_counter(), time.process_time()
    how = End(state=RunState.SUCCEEDED, keeps_owner=True, result="null", run_seconds=0.0)
    for start in range(0, count, 50):
        offers = [_offer() for _ in range(min(50, count - start))]
        now = database.now()
        with database.transaction() as tx:
            taken = groups.claim_slotless(tx, offers, now, now - timedelta(seconds=12))
        held_now = [claim for claim in taken if claim is not None]
        assert len(held_now) == len(offers)
        with database.transaction() as tx:
            assert all(groups.end(tx, [(claim, how) for claim in held_now], now))
        with database.transaction() as tx:
            held.mark_delivered(tx, [Delivered(run_id=c.id, claim=c.claim_no, keep=10_000) for c in held_now])
    return 1e6 * (time.process_time() - used) / count, 1e6 * (time.perf_counter() - began) / count


def _offer() -> Offer:
    return Offer(
        id=str(uuid.uuid4()), app="bare", func_name="recorded", args="[]", kwargs="{}", envelope="{" + " " * 500 + "}",
        queue="celery", priority=5, attempts=0, max_retries=3, retry_delay=300.0, function_slots=None,
        owner="host/0123456789ab/1", worker="celery@host",
    )  # fmt: skip


def bridge_cost(count: int) -> dict[str, float]:
    """Microseconds that calling an empty body through the bridge takes, beside calling it alone."""

    def sync() -> None:
        return None

    async def coroutine() -> None:
        return None

    def each(call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (time.perf_counter() - began) / count

    return {
        "sync function": each(lambda: bridge.call(sync, (), {}, Body())) - each(sync),
        "async function": each(lambda: bridge.call(coroutine, (), {}, Body())),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--runs", type=int, help="runs of each kind in a round (400)")
    parser.add_argument("--rounds", type=int, help="rounds (15)")
    parser.add_argument("--database", choices=stage.DATABASES, action="append", help="only this one")


def measure(options: argparse.Namespace) -> Report:
    """Measure a worker on each database, then the parts alone."""
    count = options.runs or (50 if options.quick else 400)
    rounds = options.rounds or (1 if options.quick else 15)
    figures: list[Figure] = []
    for kind in options.database or stage.DATABASES:
        with stage.project(kind) as project, stage.database_of(project) as database:
            costs, idle = worker_cost(project, database, count, rounds)
            store = [store_cost(database, count) for _ in range(rounds)]
            grouped = [grouped_cost(database, count) for _ in range(rounds)]
        figures += figures_of(kind, costs, idle, store, grouped)
    for name, micros in bridge_cost(200 if options.quick else 20_000).items():
        figures.append(Figure(name=f"bridge: an empty {name}", value=micros, unit="us"))
    return Report(
        name="ledger",
        about=(
            f"One `celery worker -P prefork -c 1`, results and events on: {rounds} alternating rounds of {count:,} "
            "runs with an empty body; CPU of main process and child. Medians; differences are those of one round."
        ),
        figures=figures,
    )


def figures_of(
    kind: str,
    costs: dict[str, list[float]],
    idle: float,
    store: list[tuple[float, float]],
    grouped: list[tuple[float, float]],
) -> list[Figure]:
    """What one database says."""
    found = [
        Figure(name=f"{kind}: CPU a run, {what}", value=median(costs[name]), unit="us", beside=spread(costs[name]))
        for name, what in KINDS.items()
    ]  # fmt: skip
    differences = [recorded - plain for recorded, plain in zip(costs["recorded"], costs["plain"], strict=True)]
    alike = [recorded - plain for recorded, plain in zip(costs["recorded"], costs["plain_alike"], strict=True)]
    ratio = median(recorded / plain for recorded, plain in zip(costs["recorded"], costs["plain"], strict=True))
    beside = (
        f"{ratio:.2f} of plain; {spread(differences)}; {median(alike):.0f} us against the one with the same options"
    )
    cpu, wall = (median(item[at] for item in store) for at in (0, 1))
    grouped_cpu, grouped_wall = (median(item[at] for item in grouped) for at in (0, 1))
    return [
        *found,
        below(300, f"{kind}: recording a run", median(differences), "us of worker CPU", beside),
        Figure(
            name=f"{kind}: bare claim, end, delivered", value=cpu, unit="us of CPU", beside=f"{wall:.0f} us of time"
        ),
        below(
            80,
            f"{kind}: the same in groups of 50",
            grouped_cpu,
            "us of CPU",
            f"{grouped_cpu / cpu:.2f} of one by one; {grouped_wall:.0f} us of time",
        ),
        Figure(name=f"{kind}: an idle worker", value=idle / 1e4, unit="% of a core"),
    ]


BENCHMARK = Benchmark(
    name="ledger",
    about="what recording a run costs the worker, and what the store alone costs",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
