"""``python -m benchmarks.faults``: which instants are lost and which are doubled when something dies."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from benchmarks import schedulers
from benchmarks.arrivals import Arrivals
from benchmarks.peers import PeerUnavailableError
from benchmarks.report import Benchmark, Figure, Report, below, run
from benchmarks.schedulers import OURS, SCHEDULERS
from benchmarks.schedulers.scheduler import MINUTE, Firing, Planned, Scheduler, killed
from tests.processes import CeleryProcess

#: Seconds in which copies may come after everything came: longer than any scheduler here waits for something.
GRACE = 12.0
NOTES = (
    "Counted is what reaches the broker's queue, by schedule and instant. Lost: an instant that nothing came for. "
    "Doubled: what came beyond the first. Late is neither, up to the minute after the last instant that counts.",
    "llmtasks: the ledger knows the instant of a message by its id. After a crash a message may be sent again with the "
    "same id, which is told as a copy. At the end a worker gets all messages, and what counts is each start of the "
    "function: a copy that started it would be a doubled instant.",
    "The others: the instant is the minute in which the message came; a worker of Celery runs every message.",
    "Celery's documentation asks for one beat at a time; the rows with several say what happens when there are more.",
    "A beat that exits is started again as soon as what was away is back, as a supervisor would do it.",
    "Store away: PostgreSQL and redbeat's own Valkey are killed and started again; a SQLite file is locked by somebody "
    "else; Celery's PersistentScheduler has only its own file.",
    "Settings of the others, the best that their documentation names: the docstrings in benchmarks/schedulers/.",
)


@dataclass(kw_only=True)
class Scene:
    """A scheduler at work, to which a fault happens during the burst of the first instant that counts."""

    options: argparse.Namespace
    scheduler: Scheduler
    arrivals: Arrivals
    beats: list[CeleryProcess]
    instants: list[datetime]
    #: What is to be said beside the numbers.
    words: list[str] = field(default_factory=list)
    exits: int = 0

    def at_half(self) -> None:
        """Return when half of the messages of the first instant are there."""
        half = self.options.schedules / 2
        self.wait(lambda: len(self.arrivals.since(self.instants[0])) >= half, look=0.002)

    def outcome(self) -> Cell:
        """Wait until all instants have come, and then for copies of them; what a worker starts in the end."""
        expected = self.options.schedules * len(self.instants)
        self.wait(lambda: len({(item.name, item.instant) for item in self.firings()}) >= expected, supervised=True)
        over = time.monotonic() + self.options.grace
        self.wait(lambda: time.monotonic() > over, supervised=True)
        ended = datetime.now(UTC)
        for beat in self.beats:
            beat.kill()
        arrivals, firings = self.arrivals.since(self.instants[0]), self.firings()
        if any(ended - item.at < timedelta(seconds=1) for item in firings):
            self.words.append("still sending after a minute")
        instant_of = {item.id: (item.name, item.instant) for item in firings}
        starts = Counter(instant_of[item] for item in self.scheduler.starts(arrivals) if item in instant_of)
        copies = len(firings) - len(instant_of)
        if self.exits:
            self.words.append("beat exited" + (f" {self.exits} times" if self.exits > 1 else ""))
        if copies:
            self.words.append(f"{copies} copies")
        return Cell(lost=expected - len(starts), doubled=starts.total() - len(starts), words=self.words)

    def firings(self) -> list[Firing]:
        """The messages of the instants that count."""
        arrivals = self.arrivals.since(self.instants[0])
        return [item for item in self.scheduler.firings(arrivals, self.options.every) if item.instant in self.instants]

    def wait(self, met: Callable[[], bool], *, look: float = 1.0, supervised: bool = False) -> None:
        """Return when it is met, or when the grid has gone on beyond the last instant that counts."""
        last = self.instants[-1] + max(self.options.every or MINUTE, timedelta(seconds=30))
        while not met() and datetime.now(UTC) < last:
            for beat in self.beats if supervised else ():
                if not beat.running:
                    self.exits += 1
                    beat.start()
            time.sleep(look)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one fault did to one scheduler."""

    lost: int = 0
    doubled: int = 0
    words: list[str]
    measured: bool = True

    def __str__(self) -> str:
        numbers = [f"{self.lost} lost, {self.doubled} doubled"] if self.measured else []
        return "; ".join([*numbers, *self.words])


def kill_and_restart(scene: Scene) -> None:
    scene.at_half()
    scene.beats[0].kill()
    scene.beats[0].start()


def kill_in_turn(scene: Scene) -> None:
    scene.at_half()
    kills = 0
    while datetime.now(UTC) < scene.instants[-1] + timedelta(seconds=1):
        beat = scene.beats[kills % len(scene.beats)]
        beat.kill()
        beat.start()
        kills += 1
        time.sleep(scene.options.pause)
    scene.words.append(f"{kills} kills")


def broker_away(scene: Scene) -> None:
    scene.at_half()
    killed(scene.scheduler.broker, scene.options.away)


def store_away(scene: Scene) -> None:
    scene.at_half()
    scene.scheduler.lose_store(scene.options.away)


def redeploy(scene: Scene) -> None:
    scene.at_half()
    scene.beats[0].terminate()
    scene.beats[0].start()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens to so many beats; the title names the options that it depends on."""

    title: str
    happens: Callable[[Scene], None]
    beats: int = 1


FAULTS = {
    "kill": Fault(title="beat killed (SIGKILL) at half of a burst, started again", happens=kill_and_restart),
    "kill-loop": Fault(
        title="three beats, one of them killed every {pause:g} s and started again", happens=kill_in_turn, beats=3
    ),
    "two-beats": Fault(title="two beats", happens=lambda _: None, beats=2),
    "broker-away": Fault(title="broker away for {away:g} s, from half of a burst", happens=broker_away),
    "store-away": Fault(title="store away for {away:g} s, from half of a burst", happens=store_away),
    "redeploy": Fault(title="beat ended (SIGTERM) at half of a burst, started again", happens=redeploy),
}


def cell(name: str, fault: Fault, options: argparse.Namespace) -> Cell:
    """Have the fault happen to the scheduler."""
    try:
        with SCHEDULERS[name](careful=not options.fast) as scheduler, Arrivals(scheduler.broker) as arrivals:
            if fault.happens is store_away and not scheduler.has_store:
                return Cell(words=["-"], measured=False)
            every = options.every or MINUTE
            first = following(every)
            plan = [Planned(name=f"{at}", every=options.every, first=first) for at in range(options.schedules)]
            scheduler.plan(plan)
            started = [scheduler.beat(number) for number in range(fault.beats)]
            first = following(every)
            instants = [first + every * at for at in range(options.instants)]
            scene = Scene(options=options, scheduler=scheduler, arrivals=arrivals, beats=started, instants=instants)
            fault.happens(scene)
            return scene.outcome()
    except PeerUnavailableError as absent:
        return Cell(words=[str(absent)], measured=False)
    except (AssertionError, subprocess.SubprocessError) as error:
        # What could not be measured is a failure of ours, and says nothing about others.
        said = f"failed: {str(error).splitlines()[0]}"
        return Cell(lost=options.schedules * options.instants, measured=name in OURS, words=[said])


def following(every: timedelta) -> datetime:
    """An instant of the grid, not before a second from now."""
    since = datetime(1970, 1, 1, tzinfo=UTC)
    return since + ((datetime.now(UTC) - since + timedelta(seconds=1)) // every + 1) * every


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    schedulers.add_options(parser)
    parser.add_argument("--fault", choices=FAULTS, action="append", metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--schedules", type=int, help="schedules, all due at the same instants (240)")
    parser.add_argument("--instants", type=int, help="instants that are counted (2)")
    parser.add_argument("--away", type=float, help="seconds that the broker or the store is away (10)")
    parser.add_argument("--pause", type=float, help="seconds between two kills of the loop (4)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="all set up for speed, as in benchmarks.scale, not to lose and double little",
    )
    parser.add_argument("--at-once", type=int, default=6, help="schedulers that are measured side by side (6)")


def measure(options: argparse.Namespace) -> Report:
    """Have every fault happen to every scheduler, the schedulers side by side."""
    names = schedulers.chosen(options)
    small = options.quick and set(names) <= set(OURS)
    # Below a minute only llmtasks has a grid: an interval of Celery's counts from the last run.
    options.every = timedelta(seconds=5) if small else None
    options.schedules = options.schedules or 240
    options.instants = options.instants or 2
    options.away = options.away or (3.0 if small else 10.0)
    options.pause = options.pause or (1.0 if small else 4.0)
    options.grace = 4.0 if small else GRACE
    faults = options.fault or list(FAULTS)
    found: dict[str, list[Cell]] = {}
    with ThreadPoolExecutor(options.at_once) as threads:
        for fault in faults:
            found[fault] = list(threads.map(lambda name, fault=fault: cell(name, FAULTS[fault], options), names))
    rows = [[FAULTS[fault].title.format(**vars(options)), *map(str, found[fault])] for fault in faults]
    every = "every 5 seconds" if small else "every minute by cron"
    return Report(
        name="faults",
        about=(
            f"{options.schedules} schedules, all due {every}; {options.instants} instants of each are counted, "
            f"{options.schedules * options.instants} in each cell. A fault begins when half of the messages of the "
            f"first instant are there. Set up {'for speed' if options.fast else 'with care'}."
        ),
        table=[["", *names], *rows],
        figures=[
            figure for at, name in enumerate(names) for figure in totals(name, [found[key][at] for key in faults])
        ],
        notes=list(NOTES),
    )


def totals(name: str, cells: list[Cell]) -> list[Figure]:
    """All faults of a scheduler together; llmtasks has to have none."""
    measured = [item for item in cells if item.measured]
    sums = {"lost": sum(item.lost for item in measured), "doubled": sum(item.doubled for item in measured)}
    if name in OURS:
        return [below(1, f"{name}: {what}", value, "instants") for what, value in sums.items()]
    return [Figure(name=f"{name}: {what}", value=value, unit="instants") for what, value in sums.items() if measured]


BENCHMARK = Benchmark(
    name="faults",
    about="which instants are lost and which are doubled when something dies, beside other schedulers",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
