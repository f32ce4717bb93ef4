"""``python -m benchmarks.workers``: workers and publishing beside Celery's own pools and other task systems."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks import stage
from benchmarks.marked import Marked
from benchmarks.peers import PEERS as ENVIRONMENTS
from benchmarks.peers import PeerUnavailableError
from benchmarks.report import Benchmark, Figure, Report, at_least, percentile, run
from benchmarks.systems import CELERY, OURS, PEERS, SYSTEMS
from benchmarks.systems.system import Place, Servers, System
from tests import children
from tests.children import ChildProcess
from tests.servers import ServerUnavailable, postgresql, valkey
from tests.waiting import wait_until

#: Seconds that a measurement may take beyond what its tasks have to sleep.
TIMEOUT = 180.0
#: Seconds after the last end in which a recovered task may still be completed a second time.
GRACE = 8.0
#: A worker with fewer slots sleeps a tenth of the tasks; what it took is multiplied.
FEW_SLOTS = 100
#: Seconds after the last start in which a worker may fetch what it fetches ahead, before it is killed.
SETTLED = 0.5
#: Seconds that a task sleeps while a worker is killed.
KILLED_SLEEP = 2
NOTES = (
    "Each task notes its start and its end in a file, 24 bytes and one system call each, the same for all systems.",
    "A worker with its processes stays on one core, the servers on another; two workers have a core each.",
    "drain: the queue is filled, then the worker starts; from the first start until all are ended and their results "
    "stored. CPU: of the worker with its processes over that time. Below 100 % of a core it waited for the server, or "
    "for others on the machine; then the CPU of a task says more than the rate.",
    "kill: the worker with its processes is killed (SIGKILL) when the tasks have started, another is started at once, "
    "nobody sends anything. Killed one after the other, then waited for side by side, each with its own server and all "
    "at their defaults. Lost is what "
    "has not ended after the time given: arq comes back to it after 310 s, taskiq after 600 s and then new messages, "
    "Celery to what had not started after an hour.",
    "latency: from before the call that sends to the start of the function, one at a time, each with an idle worker, "
    "for 20 s at most. arq and Dramatiq look for work now and then; before them pauses are up to 0.5 s, so that a task "
    "may come at any time of that, elsewhere 0.03 s.",
    "memory: resident, of the worker with its processes, summed, while so many tasks sleep; of a task: what came on "
    "top of the idle worker, divided by them.",
    "publish, bulk: a process that sends and nothing else; bulk is what the system has for many at once, or 100 at "
    "once by asyncio.gather.",
    "Not alike: llmtasks-asyncio-off and dramatiq-no-results store no results; huey and taskiq-list acknowledge "
    "nothing, so they are not durable; procrastinate is on PostgreSQL, without fsync here, and stores states only.",
    "The best peer is the best of the other systems without Celery; of those that store results where results matter "
    "(drain). Above 1 is better than it.",
    "Settings of each system, with where its documentation has them: the docstrings in benchmarks/systems/.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one work measured with one system."""

    #: In the work's units, the first of them is compared; empty where it could not be measured, the words say why.
    values: tuple[float, ...] = ()
    words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """Where one measurement happens: a system in its place, and the sizes."""

    system: System
    place: Place
    options: argparse.Namespace
    marked: Marked
    #: Whoever has it may use the processor; for those that are measured side by side.
    turn: threading.Lock

    def wait(self, met: Callable[[], bool], seconds: float, what: str, *, look: float = 0.02) -> None:
        """Return when what the tasks noted is enough."""

        def seen() -> bool:
            self.marked.look()
            return met()

        wait_until(seen, seconds, what, interval=look)

    def warmed(self) -> ChildProcess:
        """A worker that has run a task and is idle now."""
        worker = self.system.worker()
        self.system.publish("warm", "noop", 1)
        self.wait(lambda: self.marked.warm > 0, TIMEOUT, "the first task to end")
        return worker

    def sleeping(self, begin: Callable[[], None]) -> Cell:
        """Have tasks of a second slept by whatever ``begin`` starts, from the first start to the last end."""
        few = self.system.slots < FEW_SLOTS and not self.options.quick
        number = self.options.sleeps // (10 if few else 1)
        self.system.publish("preload", "sleep", number, 1)
        begin()
        self.wait(lambda: len(self.marked.ends) == number, TIMEOUT, f"{number} tasks to end")
        factor = self.options.sleeps / number
        return Cell(values=(self.marked.seconds * factor,), words=f"10 x {number} tasks" if few else "")


def drain(stand: Stand) -> Cell:
    number = stand.options.noops
    stand.system.publish("preload", "noop", number)
    worker = stand.system.worker()
    stand.wait(lambda: bool(stand.marked.starts), TIMEOUT, "the first task to start", look=0.005)
    used = stage.cpu_seconds(worker)
    stand.wait(lambda: len(stand.marked.ends) == number, TIMEOUT, f"{number} tasks to end")
    wait_until(lambda: stand.system.unfinished(number) <= 0, TIMEOUT, "all results to be stored", interval=0.01)
    took = (time.time_ns() - stand.marked.first_start) / 1e9
    used = stage.cpu_seconds(worker) - used
    return Cell(values=(number / took, 1e6 * used / number, 100 * used / took, took))


def sleep(stand: Stand) -> Cell:
    return stand.sleeping(stand.system.worker)


def two(stand: Stand) -> Cell:
    def begin() -> None:
        for core in cores():
            stand.system.worker([core])

    return stand.sleeping(begin)


def kill(stand: Stand) -> Cell:
    number = stand.options.killed
    slots = min(number, stand.system.slots)
    with stand.turn:
        worker = stand.system.worker()
        stand.system.publish("preload", "sleep", number, KILLED_SLEEP)
        stand.wait(lambda: len(stand.marked.starts) >= slots, TIMEOUT, f"{slots} tasks to start", look=0.005)
        time.sleep(SETTLED)
        worker.kill()
        killed = time.time_ns()
        worker.start()
    stand.marked.look()
    under = len(stand.marked.starts) - sum(at < killed for at in stand.marked.ends.values())
    words = f"under {under}" if under < number else ""
    try:
        stand.wait(lambda: len(stand.marked.ends) == number, stand.options.patience, "all to end", look=0.1)
    except AssertionError:
        lost = number - len(stand.marked.ends)
        return Cell(values=(float("inf"), lost, stand.marked.twice), words=words)
    took = (stand.marked.last_end - killed) / 1e9
    time.sleep(min(GRACE, stand.options.patience))
    stand.marked.look()
    return Cell(values=(took, 0, stand.marked.twice), words=words)


def latency(stand: Stand) -> Cell:
    stand.warmed()
    stand.system.publish("paced", "noop", stand.options.paced)
    stand.marked.look()
    found = [1e-6 * (stand.marked.starts[number] - at) for number, at in stand.marked.published.items()]
    words = f"{len(found)} times" if len(found) < stand.options.paced else ""
    return Cell(values=(percentile(found, 0.5), percentile(found, 0.99)), words=words)


def memory(stand: Stand) -> Cell:
    worker = stand.warmed()
    time.sleep(0.5)
    idle = resident(worker)
    running = min(stand.options.running, stand.system.slots)
    # Longer than it takes to look, and shorter than the time limits that some have as a default.
    stand.system.publish("preload", "sleep", running, 60)
    stand.wait(lambda: len(stand.marked.starts) == running, TIMEOUT, f"{running} tasks to start")
    time.sleep(0.5)
    busy = resident(worker)
    words = f"{running} running" if running < stand.options.running else ""
    return Cell(values=(busy / 1e6, (busy - idle) / running / 1e3, idle / 1e6), words=words)


def publish(stand: Stand) -> Cell:
    return sent(stand, stand.system.publish("one", "noop", stand.options.messages))


def bulk(stand: Stand) -> Cell:
    said = stand.system.publish("bulk", "noop", stand.options.messages)
    return sent(stand, said) if said["bulk"] else Cell(words="has none")


def sent(stand: Stand, said: dict[str, Any]) -> Cell:
    number = stand.options.messages
    return Cell(values=(number / said["seconds"], 1e6 * said["cpu"] / number))


def resident(worker: ChildProcess) -> float:
    """Bytes of the worker and its living descendants."""
    return float(sum(member.memory_info().rss for member in [psutil.Process(worker.pid), *worker.family()]))


def cores() -> list[int]:
    """The two cores that are used: the servers' and the worker's; none where they cannot be chosen."""
    return sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Something that is measured with each system."""

    #: Says the sizes, with the names of the options.
    title: str
    measure: Callable[[Stand], Cell]
    #: A title, a unit and digits after the point for each value; of the first is said how it compares.
    columns: tuple[tuple[str, str, int], ...]
    more_is_better: bool = False
    #: How many of the values the overview shows.
    shown: int = 1
    #: Systems at once.
    together: bool = False
    #: Bounds on the values of llmtasks-asyncio.
    limits: tuple[float, ...] = ()


WORKS = {
    "drain": Work(
        title="{noops:,} tasks that do nothing",
        measure=drain,
        columns=(("tasks", "/s", 0), ("CPU of a task", "us", 0), ("of a core", "%", 0), ("wall", "s", 1)),
        shown=2,
        more_is_better=True,
    ),
    "sleep": Work(
        title="{sleeps:,} tasks that sleep a second",
        measure=sleep,
        columns=(("wall", "s", 1),),
        limits=(5.7,),
    ),
    "two": Work(
        title="{sleeps:,} tasks that sleep a second, two workers",
        measure=two,
        columns=(("wall", "s", 1),),
        limits=(3.7,),
    ),
    "latency": Work(
        title="{paced} tasks one by one, from sending to the start",
        measure=latency,
        columns=(("p50", "ms", 1), ("p99", "ms", 1)),
        shown=2,
        limits=(2.5, 5),
    ),
    "publish": Work(
        title="{messages:,} messages one by one",
        measure=publish,
        columns=(("messages", "/s", 0), ("CPU of a message", "us", 0)),
        more_is_better=True,
    ),
    "bulk": Work(
        title="{messages:,} messages in bulk",
        measure=bulk,
        columns=(("messages", "/s", 0), ("CPU of a message", "us", 0)),
        more_is_better=True,
        limits=(16_000,),
    ),
    "memory": Work(
        title="memory of a worker with {running:,} tasks running",
        measure=memory,
        columns=(("all", "MB", 0), ("a task", "KB", 0), ("idle", "MB", 0)),
        limits=(90, 20),
    ),
    "kill": Work(
        title="worker killed under {killed} tasks of 2 s, another started; {patience:g} s",
        measure=kill,
        columns=(("all ended after", "s", 1), ("lost", "", 0), ("completed twice", "", 0)),
        shown=3,
        together=True,
        limits=(20, 0, 0),
    ),
}


@contextmanager
def servers(folder: Path, systems: Sequence[str], pinned: Sequence[int]) -> Iterator[Servers]:
    """A Valkey server, and PostgreSQL where one of the systems needs it."""
    with ExitStack() as stack:
        started = stack.enter_context(valkey(folder / "valkey"))
        postgres = None
        if "procrastinate" in systems:
            try:
                postgres = stack.enter_context(postgresql(folder))
            except ServerUnavailable as absent:
                say(str(absent))
        for server in (started, *([postgres] if postgres else [])):
            if pinned:
                for member in (psutil.Process(server.process.pid), *server.process.family()):
                    member.cpu_affinity(list(pinned))
        yield Servers(valkey=started, postgresql=postgres)


class Bench:
    """Measures systems by works, in folders of its own.

    Attributes:
        server: What stores the tasks, with its version.
    """

    server = ""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._numbers = count(1)
        self._turn = threading.Lock()

    def cells(self, work: Work) -> dict[str, Cell]:
        """What the work measures with each system: one after the other, or all side by side with a server each."""
        names: list[str] = self._options.systems
        if work.together:
            with ThreadPoolExecutor(len(names)) as threads:
                return dict(zip(names, threads.map(lambda name: self._alone(name, work), names), strict=True))
        found = {}
        with servers(self._new_folder(), names, cores()[:1]) as shared:
            for name in names:
                found[name] = self._cell(name, work, shared, cores()[-1:])
        return found

    def _alone(self, name: str, work: Work) -> Cell:
        with servers(self._new_folder(), [name], ()) as own:
            return self._cell(name, work, own, ())

    def _cell(self, name: str, work: Work, on: Servers, pinned: Sequence[int]) -> Cell:
        system = SYSTEMS[name]()
        place = Place(folder=self._new_folder(), servers=on, cores=pinned)
        try:
            with system.at(place):
                self.server = self.server or f"Valkey {system.redis().info('server')['valkey_version']}"
                stand = Stand(
                    system=system, place=place, options=self._options, marked=Marked(place.marks), turn=self._turn
                )
                cell = work.measure(stand)
        except PeerUnavailableError as absent:
            cell = Cell(words=str(absent))
        except (
            AssertionError,
            OSError,
            RuntimeError,
            subprocess.SubprocessError,
            redis.RedisError,
            psutil.Error,
        ) as error:
            cell = Cell(words=f"failed: {(str(error) or repr(error)).splitlines()[0]}")
            logs = [log.read_text("utf-8", "replace") for log in sorted(place.folder.glob("worker-*.log"))]
            say("\n".join(line for log in logs for line in log.splitlines()[-10:]))
        words = "; ".join(filter(None, [cell.words, system.words]))
        say(f"{name}: {work.title.format(**vars(self._options))}: {texts(work, cell)} {words}")
        return Cell(values=cell.values, words=words)

    def _new_folder(self) -> Path:
        return self._folder / str(next(self._numbers))


def texts(work: Work, cell: Cell) -> list[str]:
    """The values of a cell with their units."""
    if not cell.values:
        return ["-"] * len(work.columns)
    return [
        "not in that time" if value == float("inf") else f"{value:,.{digits}f} {unit}".strip()
        for value, (_, unit, digits) in zip(cell.values, work.columns, strict=True)
    ]


@contextmanager
def orderly() -> Iterator[None]:
    """Leave nothing behind when this process is asked to end: the children of a worker outlive it otherwise."""

    def end(*_: object) -> None:
        for child in children.STARTED:
            child.close()
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def best(work: Work, cells: dict[str, Cell], names: Sequence[str]) -> float | None:
    """The best first value of those systems, None if none has any."""
    values = [cells[name].values[0] for name in names if name in cells and cells[name].values]
    finite = [value for value in values if value != float("inf")]
    if not finite:
        return None
    return max(finite) if work.more_is_better else min(finite)


def comparable(work: Work) -> list[str]:
    """The peers that the others are compared with."""
    return [name for name in PEERS if work.measure is not drain or SYSTEMS[name]().results]


def ratio(work: Work, value: float, other: float | None) -> float | None:
    """How many times as good it is; None where there is nothing to say."""
    if other is None or value == float("inf") or work.together:
        return None
    return value / other if work.more_is_better else other / value


def table(work: Work, cells: dict[str, Cell]) -> list[list[str]]:
    """A row for each system."""
    peer, celery = best(work, cells, comparable(work)), best(work, cells, list(CELERY))
    compared = [] if work.together else ["x best peer", "x best Celery"]
    rows = [["", *(title for title, _, _ in work.columns), *compared, ""]]
    for name, cell in cells.items():
        ratios = [ratio(work, cell.values[0], other) if cell.values else None for other in (peer, celery)]
        said = ["" if found is None else f"{found:.2f}" for found in ratios][: len(compared)]
        rows.append([name, *texts(work, cell), *said, cell.words])
    return rows


def figures(name: str, cells: dict[str, Cell]) -> Iterator[Figure]:
    """What llmtasks measured, beside what it has to reach."""
    work = WORKS[name]
    peer, celery = best(work, cells, comparable(work)), best(work, cells, list(CELERY))
    for system in OURS:
        if system not in cells or not cells[system].values:
            continue
        cell, title = cells[system], f"{name}: {system}"
        limits = work.limits if system == "llmtasks-asyncio" else ()
        for at, (value, (column, unit, _)) in enumerate(zip(cell.values, work.columns, strict=True)):
            if value == float("inf"):
                continue
            limit = limits[at] if at < len(limits) else None
            yield bounded(f"{title}, {column}", value, unit, limit, more_is_better=work.more_is_better)
        if (over := ratio(work, cell.values[0], peer)) is not None:
            least = {"llmtasks-asyncio": 1.3, "llmtasks-asyncio-off": 1.8}.get(system) if name == "drain" else None
            yield bounded(f"{title} / best peer", over, "", least, more_is_better=True)
        if (over := ratio(work, cell.values[0], celery)) is not None:
            least = 1.3 if name == "publish" else None
            yield bounded(f"{title} / best Celery", over, "", least, more_is_better=True)


def bounded(name: str, value: float, unit: str, limit: float | None, *, more_is_better: bool) -> Figure:
    """A figure with a bound where there is one; what is just as good as the bound keeps it."""
    if limit is None:
        return Figure(name=name, value=value, unit=unit)
    if more_is_better:
        return at_least(limit, name, value, unit)
    return Figure(name=name, value=value, unit=unit, target=f"<= {limit:g} {unit}".strip(), met=value <= limit)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type of option: some of these names, separated by commas."""

    def parsed(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {','.join(known)}")
        return found

    return parsed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument(
        "--peers", dest="systems", type=names(list(SYSTEMS)), metavar="NAME,NAME", help=", ".join(SYSTEMS)
    )
    parser.add_argument("--works", type=names(list(WORKS)), metavar="NAME,NAME", help=", ".join(WORKS))
    parser.add_argument("--noops", type=int, help="tasks of drain (10,000)")
    parser.add_argument("--sleeps", type=int, help="tasks of sleep and two (5,000)")
    parser.add_argument("--paced", type=int, help="tasks of latency (300)")
    parser.add_argument("--messages", type=int, help="messages of publish and bulk (5,000)")
    parser.add_argument("--running", type=int, help="running tasks of memory (1,000)")
    parser.add_argument("--killed", type=int, help="tasks of kill (200)")
    parser.add_argument("--patience", type=float, help="seconds until what a killed worker ran is lost (120)")


SIZES = {"noops": 10_000, "sleeps": 5_000, "paced": 300, "messages": 5_000, "running": 1_000, "killed": 200}
SIZES_QUICK = {"noops": 20, "sleeps": 20, "paced": 5, "messages": 50, "running": 8, "killed": 8}
#: Without environments of other systems: Celery's pools that this one has, and ours.
QUICK = ("llmtasks-asyncio", "llmtasks-threads", "celery-prefork")
#: In the full form llmtasks-threads is left out: it is what llmtasks-asyncio is there for.
FULL = tuple(name for name in SYSTEMS if name != "llmtasks-threads")


def measure(options: argparse.Namespace) -> Report:
    """Do all works with all systems."""
    options.systems = options.systems or list(QUICK if options.quick else FULL)
    options.works = options.works or list(WORKS)
    for name, size in (SIZES_QUICK if options.quick else SIZES).items():
        setattr(options, name, getattr(options, name) or size)
    options.patience = options.patience or (2.0 if options.quick else 120.0)
    cells: dict[str, dict[str, Cell]] = {}
    with orderly(), tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), options)
        for name in options.works:
            cells[name] = bench.cells(WORKS[name])
    return Report(
        name="workers",
        about=f"One worker of each system, and a process that sends, on {bench.server} on the loopback interface.",
        table=overview(cells),
        tables={
            f"{name}: {WORKS[name].title.format(**vars(options))}": table(WORKS[name], cells[name]) for name in cells
        },
        figures=[figure for name in cells for figure in figures(name, cells[name])],
        notes=[*NOTES, versions(options.systems)],
    )


def overview(cells: dict[str, dict[str, Cell]]) -> list[list[str]]:
    """A row for each system, a column for each work."""
    titles = [
        f"{name}: {' / '.join(title for title, *_ in WORKS[name].columns[: WORKS[name].shown])}" for name in cells
    ]
    rows = []
    for system in next(iter(cells.values())):
        shown = [texts(WORKS[name], cells[name][system])[: WORKS[name].shown] for name in cells]
        rows.append([system, *(" / ".join(dict.fromkeys(each) if "-" in each else each) for each in shown)])
    return [["", *titles], *rows]


def versions(systems: Sequence[str]) -> str:
    """The versions of other people's packages."""
    environments = dict.fromkeys(SYSTEMS[name]().environment for name in systems)
    return "Versions: " + "; ".join(" ".join(ENVIRONMENTS[name]) for name in environments if name is not None) + "."


BENCHMARK = Benchmark(
    name="workers",
    about="workers and publishing beside Celery's own pools and other task systems",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
