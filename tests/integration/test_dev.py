"""``llmtasks dev``: the processes come up, come back, and are gone afterwards. Real processes, killed for real."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.children import ChildProcess
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.slow]

COMMAND = [sys.executable, "-c", "from llmtasks.cli.dev import dev; dev()"]
#: Nothing of Celery: what these tests claim holds for every process.
SLEEPERS = "one: sleep 1000\ntwo: sleep 1000\n"

CELERYCONFIG = """\
from llmtasks import settings

found = settings.read()
broker_url = found.broker_url
result_backend = found.result_url
imports = ("jobs",)
worker_concurrency = 2
beat_scheduler = "celery.beat:PersistentScheduler"
"""
JOBS = """\
import os
from celery import shared_task

@shared_task
def home():
    return os.environ["LLMTASKS_HOME"]
"""


class Dev:
    """One ``llmtasks dev`` in a folder of its own."""

    def __init__(self, folder: Path, *options: str, environ: dict[str, str], prelude: str = "pass") -> None:
        python, flag, code = COMMAND
        self.child = ChildProcess(
            [python, flag, f"{prelude}; {code}", *options],
            name="llmtasks dev",
            log=folder / "dev.log",
            cwd=folder,
            environ={**os.environ, **environ},
            death_signal=signal.SIGTERM,
        )

    def events(self, event: str | None = None, **facts: Any) -> list[dict[str, Any]]:
        """What was said with ``--json``, in its order."""
        lines = (line for line in self.child.log_of_this_start().split("\n")[:-1] if line.startswith('{"event"'))
        found = [json.loads(line) for line in lines]
        return [
            item
            for item in found
            if event in {None, item["event"]} and all(item.get(key) == value for key, value in facts.items())
        ]

    def said(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first such event, waited for."""

        def seen() -> list[dict[str, Any]]:
            assert self.child.running or self.events(event, **facts), self.child.tail()
            return self.events(event, **facts)

        return wait_until(seen, 90, f"{event} {facts}")[0]

    def end(self, *signals: signal.Signals) -> int:
        """Send the signals one after another, wait for the end, and check that no process is left."""
        family = self.child.family()
        for number in signals:
            self.child.signal(number)
        code = self.child.process.wait(90)
        wait_until(lambda: not alive(family), 30, "no process left")
        return code


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that ended and was collected by nobody does not."""
    return [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project: celeryconfig.py with one plain task."""
    (tmp_path / "celeryconfig.py").write_text(CELERYCONFIG)
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Dev]]:
    """Start ``llmtasks dev`` in the folder, with a Procfile of this text if one is given."""
    started: list[Dev] = []
    with tempfile.TemporaryDirectory(prefix="home") as home:

        def start_one(*options: str, procfile: str | None = None, prelude: str = "pass", **environ: str) -> Dev:
            if procfile is not None:
                (folder / "Procfile").write_text(procfile)
            started.append(Dev(folder, *options, environ={"LLMTASKS_HOME": home, **environ}, prelude=prelude))
            return started[-1]

        yield start_one
        for dev in started:
            dev.child.close()


def test_everything_comes_up_and_ctrl_c_stops_it_in_order(start: Callable[..., Dev], folder: Path) -> None:
    """One event for each process, the dashboard answers on the next free port, and Ctrl-C leaves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        dev = start("--json", "--port", str(port))

        assert dev.said("note", process="flower")["text"].startswith(f"port {port} is taken")
        dev.said("ready")
    assert sorted(event["process"] for event in dev.events("up")) == ["beat", "broker", "flower", "worker"]
    assert len({event["pid"] for event in dev.events("up")}) == 4
    url = dev.said("up", process="flower")["url"]
    assert url.startswith("http://127.0.0.1:")
    assert url != f"http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"{url}/healthcheck", timeout=30) as answer:
        assert answer.status == 200

    assert dev.end(signal.SIGINT) == 0

    assert [event["process"] for event in dev.events("stopped")] == ["flower", "beat", "worker", "broker"]
    assert not dev.events("died")


def test_killed_worker_is_started_again_and_that_is_said(start: Callable[..., Dev], folder: Path) -> None:
    """SIGKILL of the worker: it is named with its signal, its pool processes go, and another one takes over."""
    dev = start("--json", "--no-flower", procfile="worker: celery worker --loglevel INFO\n")
    first = dev.said("up", process="worker")["pid"]
    pool = psutil.Process(first).children(recursive=True)
    assert pool

    os.kill(first, signal.SIGKILL)

    died = dev.said("died", process="worker")
    assert (died["exit_code"], died["restart_in"]) == (-signal.SIGKILL, 1)
    wait_until(lambda: len(dev.events("up", process="worker")) == 2, 90)
    assert dev.events("up", process="worker")[1]["pid"] != first
    assert not alive(pool)
    assert dev.end(signal.SIGTERM) == 0


def test_sigkill_of_dev_leaves_nothing(start: Callable[..., Dev]) -> None:
    """Broker, worker and pool processes end with it, and it can be started again at once."""
    dev = start("--json", procfile="worker: celery worker --loglevel INFO\nnap: sleep 1000\n")
    dev.said("ready")
    family = dev.child.family()
    assert len(family) >= 5  # broker, worker, two of its pool, nap

    dev.child.kill_main()

    wait_until(lambda: not alive(family), 30, "no process left")
    dev.child.start()
    dev.said("ready")
    assert dev.end(signal.SIGINT) == 0


def test_killed_broker_is_started_again_and_work_goes_on(start: Callable[..., Dev], folder: Path) -> None:
    """The worker finds the new server by itself, and runs what is sent to it in the resolved data directory."""
    dev = start("--json", procfile="worker: celery worker --loglevel INFO\n")
    broker = dev.said("up", process="broker")
    dev.said("ready")

    os.kill(broker["pid"], signal.SIGKILL)

    assert dev.said("died", process="broker")["exit_code"] == -signal.SIGKILL
    wait_until(lambda: len(dev.events("up", process="broker")) == 2, 60)
    home = Path(broker["url"].removeprefix("redis+socket://")).parent
    send = ChildProcess(
        [sys.executable, "-c", "import celery; print(celery.current_app.send_task('jobs.home').get(timeout=60))"],
        name="sender",
        log=folder / "sender.log",
        cwd=folder,
        environ={**os.environ, "LLMTASKS_HOME": str(home)},
    )
    assert send.process.wait(90) == 0, send.tail()
    assert send.log().splitlines()[-1] == str(home)
    assert dev.end(signal.SIGINT) == 0


def test_each_process_that_is_up_is_one_line_for_people(start: Callable[..., Dev]) -> None:
    """Names in a column, no colour codes where nobody looks at a terminal, output behind its process's name."""
    dev = start(procfile="one: sleep 1000\nlonger: sh -c 'echo hello; sleep 1000'\n")
    dev.child.wait_for_log("ready in ")

    assert dev.end(signal.SIGINT) == 0

    lines = dev.child.log().splitlines()
    assert [line for line in lines if line.startswith("broker  up  pid ")]
    assert [line for line in lines if line.startswith("one     up  pid ")]
    assert [line for line in lines if line.startswith("longer  up  pid ")]
    assert "longer | hello" in lines
    assert lines[-1] == "broker  stopped"
    assert "\x1b" not in dev.child.log()


def test_process_that_ends_by_itself_is_started_again_with_growing_delays(start: Callable[..., Dev]) -> None:
    """Its exit code is said, and the others do not notice."""
    dev = start("--json", procfile="good: sleep 1000\nbad: sh -c 'exit 3'\n")

    wait_until(lambda: len(dev.events("died")) == 2, 60)

    assert [(event["exit_code"], event["restart_in"]) for event in dev.events("died", process="bad")] == [
        (3, 1),
        (3, 2),
    ]
    assert len(dev.events("up", process="good")) == 1
    assert dev.end(signal.SIGINT) == 0


def test_second_ctrl_c_kills_what_does_not_want_to_stop(start: Callable[..., Dev]) -> None:
    """A process that ignores SIGTERM, with a child that does too."""
    stubborn = "stubborn: sh -c 'trap \"\" TERM; sleep 1000 & echo deaf; while :; do sleep 1; done'\n"
    dev = start("--json", procfile=SLEEPERS + stubborn)
    dev.said("output", line="deaf")
    dev.said("ready")
    family = dev.child.family()

    dev.child.signal(signal.SIGINT)
    dev.said("note", process="")
    assert alive(family)

    assert dev.end(signal.SIGINT) == 0
    assert not alive(family)


def test_what_a_process_started_goes_with_it(start: Callable[..., Dev]) -> None:
    """A grandchild that outlives its parent would hold ports and files."""
    dev = start("--json", procfile="parent: sh -c 'sleep 1000 & echo started; wait'\n")
    dev.said("output", line="started")
    wait_until(lambda: len(dev.child.family()) == 3)  # broker, sh, sleep

    assert dev.end(signal.SIGTERM) == 0


def test_closed_terminal_stops_everything(start: Callable[..., Dev]) -> None:
    """SIGHUP, which a closing window sends, is an order to stop."""
    dev = start("--json", procfile=SLEEPERS)
    dev.said("ready")

    assert dev.end(signal.SIGHUP) == 0


def test_reader_that_goes_away_stops_everything(folder: Path) -> None:
    """``llmtasks dev | head -1``: nothing is left, and nothing complains."""
    (folder / "Procfile").write_text(SLEEPERS)
    with tempfile.TemporaryDirectory(prefix="home") as home, (folder / "errors").open("w+") as errors:
        environ = {**os.environ, "LLMTASKS_HOME": home}
        process = subprocess.Popen(COMMAND, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"broker")
        process.stdout.close()

        assert process.wait(60) == 0

        errors.seek(0)
        assert errors.read() == ""
        assert not Path(home, "broker.sock").exists()


def test_broker_of_the_users_own_is_used_and_none_is_started(start: Callable[..., Dev]) -> None:
    """It is named without its password."""
    dev = start("--json", procfile=SLEEPERS, LLMTASKS_BROKER_URL="redis://:secret@localhost:1/0")
    dev.said("ready")

    assert "not started: broker_url is redis://:**@localhost:1/0" in dev.said("note", process="broker")["text"]
    assert not dev.events("up", process="broker")
    assert "secret" not in dev.child.log()
    assert dev.end(signal.SIGINT) == 0


def test_without_flower_the_rest_comes_up_and_a_line_says_so(start: Callable[..., Dev]) -> None:
    """The dashboard is an extra."""
    procfile = "nap: sleep 1000\nflower: celery flower\n"
    dev = start("--json", procfile=procfile, prelude="import sys; sys.modules['flower'] = None")
    dev.said("ready")

    assert "pip install 'llmtasks[flower]'" in dev.said("note", process="flower")["text"]
    assert [event["process"] for event in dev.events("up")] == ["broker", "nap"]
    assert dev.end(signal.SIGINT) == 0


def test_dev_under_the_celery_command_hands_its_app_on(start: Callable[..., Dev], folder: Path) -> None:
    """``celery -A app llmtasks dev``: broker and processes are those of that app."""
    (folder / "celeryconfig.py").unlink()
    (folder / "shop.py").write_text(
        "import celery, os\nfrom llmtasks import settings\n"
        "app = celery.Celery('shop', broker=settings.read().broker_url)\n"
    )
    # The celery command with `dev` in a group, as the package's plugin has it.
    prelude = (
        "import sys, click; from celery.bin.celery import celery; from llmtasks.cli.dev import dev as command; "
        "group = click.Group('tasks', commands=[command]); celery.add_command(group); "
        "sys.argv[1:] = ['-A', 'shop', 'tasks', 'dev', *sys.argv[1:]]; sys.path.insert(0, ''); celery()"
    )

    dev = start("--json", procfile="worker: celery worker --loglevel INFO\n", prelude=prelude)

    dev.said("ready")
    assert dev.said("up", process="broker")
    assert any("app:         shop:" in event["line"] for event in dev.events("output"))
    assert dev.end(signal.SIGINT) == 0


def test_second_dev_on_the_same_data_is_refused(start: Callable[..., Dev]) -> None:
    """One sentence that names the process which has it; the first goes on."""
    first = start("--json", procfile=SLEEPERS)
    first.said("ready")

    second = start("--json")

    assert second.child.process.wait(60) == 1
    assert f"Error: process {first.child.pid} already runs the broker of " in second.child.log()
    assert first.end(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("options", "procfile", "message"),
    [
        (("--procfile", "Missing"), SLEEPERS, "'Missing' does not exist"),
        ((), "no colon here\n", "Procfile, line 1: 'no colon here': expected 'name: command'"),
        (("--app", "no_such_module"), SLEEPERS, "--app='no_such_module': expected a module with a Celery app"),
        (("--port", "0"), SLEEPERS, "0 is not in the range"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(
    start: Callable[..., Dev], options: tuple[str, ...], procfile: str, message: str
) -> None:
    """No traceback, an exit code that is not 0."""
    dev = start(*options, procfile=procfile)

    assert dev.child.process.wait(60) in {1, 2}
    assert message in dev.child.log()
    assert "Traceback" not in dev.child.log()
    assert "up  pid" not in dev.child.log()
