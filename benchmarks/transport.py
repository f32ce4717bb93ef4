"""``python -m benchmarks.transport``: our Redis transport beside stock kombu's, without Celery."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Benchmark, Figure, Report, median, run, spread
from tests.processes import REPOSITORY
from tests.servers import Valkey, valkey

#: Publishes so many messages one by one, consumes them on kombu's event loop and acknowledges each; prints the times.
#: The messages look like Celery's, and the consumer does nothing else.
ROUND = """
import json, sys, time
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub, set_event_loop
import llmtasks
from llmtasks.redis_options import REDIS_OPTIONS

url, transport, count, prefetch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
headers = {
    "lang": "py", "task": "plain", "id": "8f2a", "shadow": None, "eta": None, "expires": None, "group": None,
    "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": "8f2a", "parent_id": None,
    "argsrepr": "(1,)", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": False, "replaced_task_nesting": 0,
}
embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
with Connection(url, transport_options=REDIS_OPTIONS[transport]) as connection:
    producer = connection.Producer()
    def publish():
        producer.publish([[1], {}, embed], routing_key="q", priority=4, headers=headers, correlation_id="8f2a")
    publish()  # connects
    began = time.perf_counter()
    for _ in range(count):
        publish()
    published = time.perf_counter() - began

hub = set_event_loop(Hub())
left = count + 1
with Connection(url, transport_options=REDIS_OPTIONS[transport]) as connection:
    def take(message):
        global left, began, cpu
        message.ack()
        if left == count + 1:
            began, cpu = time.perf_counter(), time.process_time()
        left -= 1
    connection.register_with_event_loop(hub)
    with Consumer(connection, [Queue("q")], on_message=take) as consumer:
        consumer.qos(prefetch_count=prefetch)
        while left:
            hub.run_once()
        hub.call_later(0.001, lambda: None)  # not to sleep in the turn that sends the last acknowledgements
        hub.run_once()
        consumed, used = time.perf_counter() - began, time.process_time() - cpu
    channel = connection.default_channel
    with channel.conn_or_acquire() as client:
        held = client.hlen(channel.unacked_key)
    assert held == 0, f"{held} messages are not acknowledged"
print(json.dumps({"published": published, "consumed": consumed, "cpu": used}))
"""
TRANSPORTS = ("stock", "llmtasks")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its own options."""
    parser.add_argument("--messages", type=int, help="messages of each transport in a round (5,000)")
    parser.add_argument("--rounds", type=int, help="rounds (9)")
    parser.add_argument("--prefetch", type=int, default=1000, help="messages that the consumer may hold (1,000)")


def measure(options: argparse.Namespace) -> Report:
    """Measure both transports in turns, each round in a process of its own."""
    count = options.messages or (500 if options.quick else 5_000)
    rounds = options.rounds or (1 if options.quick else 9)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRANSPORTS}
    with (
        tempfile.TemporaryDirectory(prefix="llmtasks-benchmark-") as folder,
        valkey(Path(folder) / "valkey", unix=True) as server,
    ):
        for number in range(rounds):
            for name in TRANSPORTS if number % 2 == 0 else reversed(TRANSPORTS):
                found[name].append(one_round(server, name, count, options.prefetch))
    return Report(
        name="transport",
        about=(
            f"A kombu consumer on its event loop that may hold {options.prefetch:,} messages, and a producer; Valkey "
            f"on a unix socket: {rounds} alternating rounds of {count:,} messages, each in a fresh process. "
            "A ratio is the median of the rounds' ratios."
        ),
        figures=figures_of(found),
    )


def one_round(server: Valkey, transport: str, count: int, prefetch: int) -> dict[str, float]:
    """What one process measured, per message."""
    server.flush()
    command = [sys.executable, "-c", ROUND, server.url, transport, str(count), str(prefetch)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a round of {transport} ended with exit code {done.returncode}: {done.stderr}")
    said: dict[str, Any] = json.loads(done.stdout)
    return {
        "published": count / said["published"],
        "consumed": count / said["consumed"],
        "cpu": said["cpu"] / count * 1e6,
    }


def figures_of(found: dict[str, list[dict[str, float]]]) -> list[Figure]:
    """The rates and their ratios."""
    figures = []
    for what, title, unit in (
        ("consumed", "fetched and acknowledged", "/s"),
        ("cpu", "CPU of the consumer", "us a message"),
        ("published", "published one by one", "/s"),
    ):
        values = {name: [each[what] for each in found[name]] for name in TRANSPORTS}
        ratios = [ours / stock for ours, stock in zip(values["llmtasks"], values["stock"], strict=True)]
        figures += [
            Figure(name=f"{title}, {name}", value=median(values[name]), unit=unit, beside=spread(values[name]))
            for name in TRANSPORTS
        ]
        figures.append(Figure(name=f"{title}, ratio", value=median(ratios), unit="", beside=spread(ratios, 2)))
    return figures


BENCHMARK = Benchmark(
    name="transport",
    about="our Redis transport beside stock kombu's, without Celery",
    add_options=add_options,
    measure=measure,
)

if __name__ == "__main__":
    run(BENCHMARK)
