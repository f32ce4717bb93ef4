"""What the soak does and when: all of it drawn from one seed before anything starts."""

from dataclasses import dataclass
from random import Random

#: Who may be hit, how, and how often beside the others.
ACTS = {
    "SIGKILL worker": 4,
    "SIGTERM worker": 2,
    "SIGKILL child": 5,
    "SIGKILL beat": 2,
    "SIGTERM beat": 1,
    "SIGKILL valkey": 2,
    "SIGKILL postgresql": 2,
}
#: What is asked for, and how often beside the others.
LOADS = {
    "delay": 30,
    "slow": 12,
    "retries": 8,
    "pair": 10,
    "single": 6,
    "unique": 8,
    "cancel": 6,
    "one-off": 6,
    "execute_now": 6,
    "chord": 4,
    "chain": 4,
}
#: Seconds between two acts, between two loads.
ACT_EVERY = (0.5, 4.0)
LOAD_EVERY = (0.02, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One act or one load."""

    #: Seconds after the begin.
    at: float
    what: str
    #: Chooses among what is there: a worker, a child, the length of a chain.
    number: int
    #: Seconds: how long a server stays away, how long a function runs.
    seconds: float


def steps(rng: Random, choices: dict[str, int], every: tuple[float, float], until: float) -> list[Step]:
    """Steps at random distances, to the end."""
    found: list[Step] = []
    at = rng.uniform(*every)
    while at < until:
        (what,) = rng.choices(list(choices), list(choices.values()))
        found.append(Step(at=at, what=what, number=rng.randrange(1000), seconds=rng.uniform(0.05, 1.5)))
        at += rng.uniform(*every)
    return found


def plan(seed: int, seconds: float, *, postgresql: bool) -> tuple[list[Step], list[Step]]:
    """The acts and the loads of a soak."""
    rng = Random(seed)
    acts = {what: weight for what, weight in ACTS.items() if postgresql or what != "SIGKILL postgresql"}
    return steps(rng, acts, ACT_EVERY, seconds), steps(rng, LOADS, LOAD_EVERY, seconds)
