"""Cursors and etags: opaque strings that go through a client and come back."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatdb
from chatdb import Conversation, InvalidInputError
from chatdb._core.validate import check_after, check_expected
from tests.support.calls import NOBODYS
from tests.support.talk import Talk

IDS = st.integers(-(2**63), 2**63 - 1)
TIMES = st.datetimes(timezones=st.just(UTC))


def conversation(**fields: Any) -> Conversation:
    """Return a conversation with these values."""
    return NOBODYS.model_copy(update=fields)


@given(IDS, TIMES, TIMES)
def test_a_cursor_holds_the_place(identifier: int, updated_at: datetime, created_at: datetime) -> None:
    """A cursor stands for the conversation's times, to the microsecond, and its id."""
    made = conversation(id=identifier, updated_at=updated_at, created_at=created_at)

    for order, time in (("updated_at", updated_at), ("created_at", created_at)):
        assert check_after(made.cursor, order) == check_after(made, order) == (time, identifier)
    assert re.fullmatch(r"c1[A-Za-z0-9_-]+", made.cursor)


@given(IDS, st.integers(0, 2**63 - 1))
def test_an_etag_holds_the_revision(identifier: int, revision: int) -> None:
    """An etag stands for the conversation's id and revision."""
    made = conversation(id=identifier, revision=revision)

    assert check_expected(made.etag) == check_expected(made) == (identifier, revision)
    assert re.fullmatch(r"e1[A-Za-z0-9_-]+", made.etag)


def test_equal_and_different() -> None:
    """Tokens are equal if what they stand for is, whatever the title and the time zone."""
    one = conversation(id=1, revision=2)
    zone = timezone(timedelta(hours=5, minutes=45))
    moved = conversation(id=1, revision=2, title="x", updated_at=NOBODYS.updated_at.astimezone(zone))

    assert (moved.etag, moved.cursor) == (one.etag, one.cursor)
    assert len({conversation(id=a, revision=b).etag for a in range(5) for b in range(5)}) == 25
    assert len({conversation(id=a).cursor for a in range(5)}) == 5
    later = conversation(id=1, updated_at=NOBODYS.updated_at + timedelta(microseconds=1))
    assert later.cursor != one.cursor


@pytest.mark.parametrize("kind", ["cursor", "etag"])
def test_every_change_of_a_token(kind: str) -> None:
    """A token with one character less, more or changed is refused, or is the token of another conversation."""
    made = conversation(id=123456789, revision=42)
    token: str = getattr(made, kind)
    parameter = "after" if kind == "cursor" else "expected"

    def read(text: str) -> Any:
        return check_after(text, "updated_at") if kind == "cursor" else check_expected(text)

    changed = {token[:place] + token[place + 1 :] for place in range(len(token))}
    for place in range(len(token) + 1):
        for new in "A_-z9+/= \n\u0430":
            changed |= {token[:place] + new + token[place:], token[:place] + new + token[place + 1 :]}
    for text in changed - {token}:
        try:
            found = read(text)
        except InvalidInputError as error:
            assert (error.parameter, token in str(error)) == (parameter, False)  # noqa: PT017 - one of two outcomes
        else:
            assert len(text) == len(token)
            assert found != read(token) or kind == "cursor"


@given(st.text() | st.from_regex(r"[ce][0-9][A-Za-z0-9_-]{0,40}", fullmatch=True) | st.binary().map(lambda b: b.hex()))
def test_any_text(text: str) -> None:
    """Whatever a client sends is read or is an InvalidInputError."""
    for read in (
        lambda: check_after(text, "updated_at"),
        lambda: check_after(text, "created_at"),
        lambda: check_expected(text),
    ):
        try:
            read()
        except InvalidInputError as error:
            assert error.parameter in {"after", "expected"}  # noqa: PT017 - one of two outcomes


@pytest.mark.parametrize("version", ["0", "2", "9"])
def test_another_version(version: str) -> None:
    """A token of another version says so, and what to do."""
    made = conversation(id=1)

    with pytest.raises(InvalidInputError, match=r"^after: is a cursor of another version .*: start with the first"):
        check_after(f"c{version}{made.cursor[2:]}", "updated_at")
    with pytest.raises(InvalidInputError, match=r"^expected: is an etag of another version .*: read it again$"):
        check_expected(f"e{version}{made.etag[2:]}")


def test_one_for_the_other() -> None:
    """A cursor is no etag, and an etag no cursor."""
    made = conversation(id=1)

    with pytest.raises(InvalidInputError, match=r"^after: is not a cursor that chatdb made$"):
        check_after(made.etag, "updated_at")
    with pytest.raises(InvalidInputError, match=r"^expected: is not an etag that chatdb made$"):
        check_expected(made.cursor)


async def test_tokens_of_stored_conversations(tx: asyncpg.Connection) -> None:
    """Every write changes the etag, a read does not, and the cursor follows the time of the last append."""
    talk = Talk(tx, await chatdb.create_conversation(tx, user_id="alice", key="k"))
    etags, cursors = [], []
    for write in (talk.append, lambda: talk.update_conversation(title="x"), talk.pop_message):
        await write()
        now = await talk.now()
        assert now.etag == (await talk.now()).etag
        etags.append(now.etag)
        cursors.append(now.cursor)
    assert len(set(etags)) == 3
    assert len(set(cursors)) == 1
    await talk.append()
    assert (await talk.now()).cursor not in cursors


def test_tokens_are_not_fields() -> None:
    """A record's dump and JSON have no tokens, which a service adds to its own answers."""
    made = conversation(id=1)

    assert not {"cursor", "etag"} & made.model_dump().keys()
    assert Conversation.model_validate_json(made.model_dump_json()).etag == made.etag
