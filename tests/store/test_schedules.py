"""Schedules: the due ones are claimed by one beat each, and their rows say what was saved."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert

from llmtasks.errors import ConfigurationError
from llmtasks.states import ScheduleState
from llmtasks.store import rows, schedules
from llmtasks.store.database import Database
from llmtasks.store.schedules import Advance, Schedule, trigger_columns
from llmtasks.triggers import Cron, Interval, Once, Trigger
from tests.conftest import SERVERS, on
from tests.store.plans import analyze, plan_of
from tests.store.rows_of import APP, NOW, later, schedule


def put(database: Database, *new: Schedule) -> list[Schedule]:
    with database.transaction() as tx:
        return [schedules.put(tx, item, NOW) for item in new]


@pytest.mark.parametrize(
    "trigger", [Once(later(60)), Interval(timedelta(seconds=0.25), NOW), Cron("0 3 * * 1-5", "Europe/Berlin")], ids=repr
)
def test_stored_schedule_is_the_one_that_was_put(database: Database, trigger: Trigger) -> None:
    """Every value comes back as it was, with the times of its writing; its trigger names the same instants."""
    given = schedule(
        "a",
        args=[1],
        kwargs={"to": ["ä"]},
        options={"priority": 3},
        declared_key="shop:emails",
        ends_at=later(99),
        **trigger_columns(trigger),
    )

    (stored,) = put(database, given)

    assert stored == replace(given, created_at=NOW, updated_at=NOW)
    assert stored.trigger == trigger
    with database.reading() as connection:
        assert schedules.get(connection, "a") == stored
        assert schedules.get(connection, "b") is None


def test_second_put_changes_the_row(database: Database) -> None:
    """Its creation stays."""
    (stored,) = put(database, schedule("a"))

    with database.transaction() as tx:
        changed = schedules.put(tx, replace(stored, name="post", state=ScheduleState.PAUSED), later(5))

    assert (changed.name, changed.state, changed.created_at, changed.updated_at) == (
        "post",
        ScheduleState.PAUSED,
        NOW,
        later(5),
    )


def test_row_without_a_readable_trigger_says_so(database: Database) -> None:
    """The error names the schedule and what to do."""
    (stored,) = put(database, schedule("a", kind="cron"))

    with pytest.raises(ConfigurationError, match=r"schedule a \('emails'\) has no readable trigger: kind 'cron'; save"):
        _ = stored.trigger


def test_same_trigger_ignores_an_intervals_anchor() -> None:
    """A one-off at another instant is another trigger, an interval on a moved grid is not."""
    interval = schedule("a")
    once = schedule("b", **trigger_columns(Once(later(1))))

    assert interval.same_trigger(replace(interval, anchor=later(7)))
    assert not interval.same_trigger(replace(interval, every_us=1))
    assert not once.same_trigger(replace(once, anchor=later(7)))


def test_due_rows_come_oldest_first(database: Database) -> None:
    """Those of the app whose time has come, as many as asked for."""
    put(
        database,
        schedule("b", next_run_at=later(-1)),
        schedule("a", next_run_at=later(-2)),
        schedule("c", next_run_at=later(0.1)),
        schedule("d", next_run_at=None, state=ScheduleState.PAUSED),
        schedule("e", app="other", next_run_at=later(-9)),
    )

    with database.transaction() as tx:
        assert [row.id for row in schedules.due(tx, APP, NOW, 10)] == ["a", "b"]
        assert [row.id for row in schedules.due(tx, APP, NOW, 1)] == ["a"]
        assert [schedules.from_row(row).id for row in schedules.due(tx, APP, later(1), 10)] == ["a", "b", "c"]
        assert schedules.next_due(tx, APP) == later(-2)
        assert schedules.next_due(tx, "nobody") is None
        assert (schedules.overdue(tx, APP, later(-1)), schedules.overdue(tx, APP, later(9))) == (1, 3)


@on(*SERVERS)
def test_two_beats_claim_different_schedules(database: Database) -> None:
    """What one has locked the other passes over, without waiting."""
    put(database, *(schedule(f"s{n}", next_run_at=later(n)) for n in range(6)))

    with database.transaction() as one, database.transaction() as two:
        first = [row.id for row in schedules.due(one, APP, later(9), 4)]
        second = [row.id for row in schedules.due(two, APP, later(9), 4)]

    assert (first, second) == (["s0", "s1", "s2", "s3"], ["s4", "s5"])


def test_schedules_move_on(database: Database) -> None:
    """Next and last run, state and reason; where nothing fired the last run stays."""
    put(database, schedule("a", last_run_at=later(-60)), schedule("b"))

    with database.transaction() as tx:
        schedules.advance(tx, [])
        schedules.advance(
            tx,
            [
                Advance(schedule_id="a", next_at=later(60), last_at=None, to=ScheduleState.ACTIVE, why=None),
                Advance(schedule_id="b", next_at=None, last_at=NOW, to=ScheduleState.COMPLETED, why="it fired"),
            ],
        )
        a, b = schedules.get(tx, "a"), schedules.get(tx, "b")

    assert a is not None
    assert b is not None
    assert (a.next_run_at, a.last_run_at, a.state, a.reason) == (later(60), later(-60), ScheduleState.ACTIVE, None)
    assert (b.next_run_at, b.last_run_at, b.state, b.reason) == (None, NOW, ScheduleState.COMPLETED, "it fired")


def test_schedules_are_found_by_what_people_ask_for(database: Database) -> None:
    """By name, function, state and origin, within the app, by name and age."""
    with database.transaction() as tx:
        schedules.put_many(
            tx,
            [
                schedule("1", name="b"),
                schedule("2", name="a", declared_key="shop:a"),
                schedule("3", name="c", func_name="report", state=ScheduleState.PAUSED),
                schedule("4", name="b", app="other"),
            ],
            NOW,
        )
        schedules.put_many(tx, [], NOW)

    def found(**query: Any) -> list[str]:
        with database.reading() as connection:
            return [item.id for item in schedules.find(connection, APP, **query)]

    assert found() == ["2", "1", "3"]
    assert found(name="b") == ["1"]
    assert found(func_name="report") == ["3"]
    assert found(states=[ScheduleState.PAUSED, ScheduleState.CANCELLED]) == ["3"]
    assert (found(declared=True), found(declared=False)) == (["2"], ["1", "3"])
    assert found(limit=1) == ["2"]
    with database.transaction() as tx:
        assert schedules.get(tx, "5") is None


def test_due_query_uses_its_index_among_100_000_schedules(database: Database) -> None:
    """What is due is found without reading what is not, whatever the table's size."""
    row = schedules._to_row(schedule("x", created_at=NOW, updated_at=NOW))
    many = [{**row, "id": f"s{n}", "next_run_at": later(n % 9_000) if n % 3 else None} for n in range(100_000)]
    with database.transaction() as tx:
        tx.execute(insert(rows.schedules), many)
    analyze(database, "llmtasks_schedules")

    with database.transaction() as tx:
        for statement in (schedules._DUE, schedules._NEXT):
            query = str(statement.compile(tx.engine, compile_kwargs={"render_postcompile": True}))
            values: Any = {"app": APP, "now": later(1), "limit": 500, "param_1": 1}
            if database.is_sqlite:
                compiled = statement.compile(tx.engine, compile_kwargs={"render_postcompile": True})
                values = tuple(
                    str(values[name]) if name == "now" else values.get(name, 1) for name in compiled.positiontup or ()
                )
            plan = plan_of(tx, query, values)
            assert "ix_llmtasks_schedules_due" in plan.indexes, plan
            assert not plan.scanned, plan
            assert not plan.sorts, plan
        assert len(schedules.due(tx, APP, later(1), 500)) == 12


def test_declared_schedules_are_found_without_reading_the_others(database: Database) -> None:
    """Beats look for them again and again, among however many that people made."""
    row = schedules._to_row(schedule("x", created_at=NOW, updated_at=NOW))
    many = [{**row, "id": f"s{n}", "name": f"n{n}", "declared_key": None} for n in range(20_000)]
    with database.transaction() as tx:
        tx.execute(insert(rows.schedules), [*many, {**row, "id": "mine", "declared_key": "shop:mine"}])
    analyze(database, "llmtasks_schedules")
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    with database.transaction() as tx:
        event.listen(tx, "before_cursor_execute", note)
        assert [item.id for item in schedules.find(tx, APP, declared=True)] == ["mine"]
        assert [item.id for item in schedules.find(tx, APP, declared=True, states=[ScheduleState.ACTIVE])] == ["mine"]
        event.remove(tx, "before_cursor_execute", note)
        for statement, parameters in seen:
            plan = plan_of(tx, statement, parameters)
            # MariaDB's indexes leave no row out: there it is the unique one of what code declares.
            assert plan.indexes & {"ix_llmtasks_schedules_declared", "declared_key"}, plan
            assert not plan.scanned, plan


def test_long_cron_expression_is_stored(database: Database) -> None:
    """As long as a trigger may be."""
    expression = ",".join(["0"] * 496) + " * * * *"
    (stored,) = put(database, schedule("a", kind="cron", expression=expression, every_us=None, anchor=None))

    assert len(expression) == 999
    assert stored.expression == expression
