"""Reading a Procfile and making command lines of it."""

import sys
from pathlib import Path

import pytest

from llmtasks.cli.procfile import DEFAULT, Entry, Kind, environment, parse, read
from llmtasks.cli.supervisor import Backoff
from llmtasks.errors import ConfigurationError


def only(line: str) -> Entry:
    (entry,) = parse(line, "Procfile")
    return entry


def test_entries_keep_their_order_and_comments_are_left_out() -> None:
    """The order of the file is the order of starting, its reverse that of stopping."""
    entries = parse("# all\n\nworker: celery worker\n  beat:celery beat  \nflower : celery flower\n", "Procfile")

    assert [entry.name for entry in entries] == ["worker", "beat", "flower"]
    assert [entry.kind for entry in entries] == [Kind.WORKER, Kind.BEAT, Kind.FLOWER]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker celery worker", r"Procfile, line 1: 'worker celery worker': expected 'name: command'"),
        ("a: true\na: false", r"line 2: 'a' stands there twice"),
        ("a: echo 'open", r"line 1: \"echo 'open\" cannot be read: No closing quotation"),
        ("a: NAME=value", r"line 1: .*expected a command after the colon"),
        ("# nothing\n", r"names no process"),
    ],
)
def test_unreadable_procfile_is_refused_with_line_and_reason(text: str, message: str) -> None:
    """The message says which line it is and what was expected."""
    with pytest.raises(ConfigurationError, match=message):
        parse(text, "Procfile")


def test_celery_runs_in_this_python() -> None:
    """It works where the virtual environment is not activated."""
    assert only("w: celery worker -l INFO").command({}) == [sys.executable, "-m", "celery", "worker", "-l", "INFO"]


def test_app_is_added_where_the_entry_names_none() -> None:
    """The command line's app is a default, not an override."""
    assert only("w: celery worker").command({}, app="shop")[2:] == ["celery", "-A", "shop", "worker"]
    assert only("w: celery -A mine worker").command({}, app="shop")[2:] == ["celery", "-A", "mine", "worker"]
    assert only("w: celery --app=mine worker").command({}, app="shop")[2:] == ["celery", "--app=mine", "worker"]
    assert only("w: uvicorn web:app").command({}, app="shop") == ["uvicorn", "web:app"]


def test_variables_are_filled_in() -> None:
    """The three spellings that Procfiles use, as one word each."""
    entry = only("web: serve $HOST --port=${PORT:-8000} '${NAME}' ${GONE}")

    assert entry.command({"HOST": "a b", "NAME": "x"}) == ["serve", "a b", "--port=8000", "x", ""]
    assert entry.command({"PORT": "9"})[2] == "--port=9"


def test_assignments_before_the_command_reach_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell; the data directory is given to every process."""
    monkeypatch.setenv("A", "outer")
    entry = only("w: A=1 B='two words' celery worker")

    environ = environment(entry, tmp_path)

    assert entry.kind is Kind.WORKER
    assert (environ["A"], environ["B"], environ["LLMTASKS_HOME"]) == ("1", "two words", str(tmp_path))
    assert environ["PATH"].startswith(str(Path(sys.executable).parent))
    assert "LLMTASKS_HOME" not in environment(entry, None)


def test_options_are_found_in_both_spellings() -> None:
    """The last one counts, as for the program itself."""
    entry = only("f: celery flower --port 1 --address=${HOST:-127.0.0.1} --port=2")

    assert entry.option("port", {}) == "2"
    assert entry.option("address", {}) == "127.0.0.1"
    assert entry.option("url-prefix", {}) == ""
    assert only("f: celery flower --port").option("port", {}) == ""


def test_without_a_procfile_the_built_in_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one in the current folder wins over it."""
    monkeypatch.chdir(tmp_path)
    assert [entry.name for entry in read(None)] == ["worker", "beat", "flower"]

    (tmp_path / "Procfile").write_text("web: true\n")

    assert [entry.name for entry in read(None)] == ["web"]


def test_the_projects_procfile_is_the_built_in_one() -> None:
    """Two texts, one meaning: a clone and an installed package run the same."""
    assert (Path(__file__).parents[2] / "Procfile").read_text() == DEFAULT


def test_restarts_wait_longer_each_time_and_forget_after_a_lasting_run() -> None:
    """1, 2, 4, ... 30 seconds, and 1 again after 30 seconds of life."""
    backoff = Backoff()

    assert [backoff.after(0.1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(30), backoff.after(0.1)] == [1, 2]
