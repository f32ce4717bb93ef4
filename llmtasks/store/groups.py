"""Claims and ends of many runs in one transaction: what surrounds a statement costs more than the statement.

PostgreSQL does a whole group in one statement and one round trip (27 us of CPU for a claim in groups of 50, against 77
with a statement for each in one pipeline and 110 alone). SQLite and MariaDB do one statement after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, literal, select

from llmtasks.store import claims, ends
from llmtasks.store.claims import NEW, RETURNED, Claim, Offer
from llmtasks.store.dialects import insert_into, unnested
from llmtasks.store.ends import GIVEN, End
from llmtasks.store.prepared import Prepared
from llmtasks.store.rows import runs


def claim_slotless(
    tx: Connection, offers: Sequence[Offer], now: datetime, silent_since: datetime
) -> list[Claim | None]:
    """Take runs that need no slot, each once; None stands for what needs a transaction of its own, or is not ours."""
    # In the order in which everybody locks rows.
    in_order = sorted((offer for offer in offers if offer.function_slots is None), key=lambda offer: offer.id)
    if tx.dialect.name == "postgresql":
        values = [claims.values_of(offer, now, silent_since) for offer in in_order]
        columns = {name: [row[name] for row in values] for name in Offer.__dataclass_fields__}
        rows = _CLAIMS.all(tx, {**columns, "now": now, "silent_since": silent_since})
        found = {row[0]: claims.taken(row) for row in rows}
    else:
        found = {offer.id: claims.claim_slotless(tx, offer, now, silent_since) for offer in in_order}
    return [found.get(offer.id) for offer in offers]


def end(tx: Connection, attempts: Sequence[tuple[Claim, End]], now: datetime) -> list[bool]:
    """End the attempts of claims that are lone (``ends.is_lone``); says of each whether the run was still ours."""
    in_order = sorted(attempts, key=lambda attempt: attempt[0].id)
    if tx.dialect.name == "postgresql":
        values = [ends.values_of(claim, how, now) for claim, how in in_order]
        rows = _ENDS.all(tx, {name: [row[name] for row in values] for name in GIVEN})
        ours = {row[0] for row in rows}
    else:
        ours = {claim.id for claim, how in in_order if ends.end_lone(tx, claim, how, now)}
    return [claim.id in ours for claim, _ in attempts]


def _claims(dialect: str) -> Any:
    given = unnested({name: runs.c[name].type for name in Offer.__dataclass_fields__})
    row = {**NEW, **given, "name": given["func_name"]}
    values = [
        value if isinstance(value, ColumnElement) else literal(value, runs.c[name].type) for name, value in row.items()
    ]
    return claims.or_take(insert_into(runs, dialect).from_select(list(row), select(*values)), claims.takeable_alone)


_CLAIMS: Final = Prepared(_claims, RETURNED)
_ENDS: Final = Prepared(lambda _dialect: ends.ending(unnested(GIVEN)).returning(runs.c.id), [runs.c.id])
