"""What in the rows will not go on by itself is found, and what goes on is not."""

from llmtasks.states import RunState, ScheduleState
from llmtasks.store import schedules, troubles
from llmtasks.store.database import Database
from llmtasks.store.troubles import Fired, Queued, SetAside, Untold
from tests.store.rows_of import APP, NOW, later, new_run, opened, publish, schedule, set_run


def test_functions_of_schedules_that_fire_are_counted(database: Database) -> None:
    """Once for each function and way of running it; paused schedules, those of other apps do not count."""
    with database.transaction() as tx:
        for row in (
            schedule("1", name="b", func_name="mail"),
            schedule("2", name="a", func_name="mail"),
            schedule("3", name="c", func_name="mail", handed=True),
            schedule("4", name="d", func_name="paused", state=ScheduleState.PAUSED, next_run_at=None),
            schedule("5", name="e", func_name="elsewhere", app="other"),
        ):
            schedules.put(tx, row, NOW)

        found = troubles.fired(tx, APP)

    assert sorted(found, key=lambda item: item.handed) == [
        Fired(func_name="mail", handed=False, schedules=2, example="a"),
        Fired(func_name="mail", handed=True, schedules=1, example="c"),
    ]


def test_schedules_set_aside_are_found_with_their_reasons(database: Database) -> None:
    """Active and without a next run; those that fire, are paused or have ended are not."""
    with database.transaction() as tx:
        for row in (
            schedule("1", name="fires"),
            schedule("2", name="paused", state=ScheduleState.PAUSED, next_run_at=None),
            schedule("3", name="over", state=ScheduleState.COMPLETED, next_run_at=None),
            schedule("4", name="z", next_run_at=None, reason="set aside: gone"),
            schedule("5", name="a", next_run_at=None),
        ):
            schedules.put(tx, row, NOW)

        assert troubles.set_aside(tx, APP, 9) == [
            SetAside(id="5", name="a", reason=None),
            SetAside(id="4", name="z", reason="set aside: gone"),
        ]
        assert [item.id for item in troubles.set_aside(tx, APP, 1)] == ["5"]


def test_queued_runs_are_counted_by_queue(database: Database) -> None:
    """Those that the broker has; not those in the outbox, and not those that run."""
    opened(database, *(new_run(name, queue=queue) for name, queue in {"a": None, "b": "mail", "c": "mail"}.items()))
    opened(database, new_run("d", queue="mail"), new_run("e", queue="gpu"))
    publish(database, "a", "b", "c", "e")
    set_run(database, "e", state=RunState.RUNNING)

    with database.reading() as connection:
        found = troubles.queued(connection, APP)
        assert troubles.queued(connection, "other") == []

    assert {item.queue: item for item in found} == {
        None: Queued(queue=None, func_name="sync_emails", runs=1),
        "mail": Queued(queue="mail", func_name="sync_emails", runs=2),
    }


def test_ends_told_in_vain_are_counted_from_so_many_times_on(database: Database) -> None:
    """One that was told, one that was sent seldom and one that lives are none."""
    opened(database, *(new_run(name) for name in "abcde"))
    untold = {"state": RunState.FAILED, "ended_at": NOW, "delivery_sent_at": NOW, "publications": 4}
    set_run(database, "a", **untold | {"ended_at": later(9), "publications": 7})
    set_run(database, "b", **untold | {"ended_at": later(1)})
    set_run(database, "c", **untold | {"publications": 3})
    set_run(database, "d", **untold | {"delivered": True})
    set_run(database, "e", publications=9)

    with database.reading() as connection:
        assert troubles.untold(connection, APP, 4) == Untold(count=2, example="b", times=4)
        assert troubles.untold(connection, APP, 8) is None
        assert troubles.untold(connection, "other", 1) is None
