"""Search in a user's messages: both modes side by side, pages, snippets and bad input."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

import chatdb
from chatdb import ConfigurationError, Conversation, ConversationNotFoundError, InvalidInputError, Match
from tests.support.calls import NOBODYS, Counting
from tests.support.catalog import SEARCH_INDEX
from tests.support.talk import Talk

MODES = ("substring", "words")
both_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
async def indexed(talk: Talk) -> Talk:
    """Give a conversation of alice in a database with the search index."""
    await talk.db.execute("create extension btree_gin")
    await talk.db.execute(SEARCH_INDEX.replace("concurrently ", ""))
    return talk


async def found(talk: Talk, query: str, mode: str = "substring") -> list[str]:
    """Return the snippets of a search in all conversations, after comparing them with those in the one conversation."""
    answer = await chatdb.search_messages(talk.db, user_id="alice", query=query, mode=mode)
    key = (await talk.now()).key
    assert await talk.search_messages(query=query, mode=mode) == answer
    if key is not None:
        by_key = {"user_id": "alice", "conversation_key": key}
        assert await chatdb.search_messages(talk.db, **by_key, query=query, mode=mode) == answer
    return [each.snippet for each in answer]


SIDE_BY_SIDE = [
    # the text, the query, whether mode substring finds it, whether mode words does
    ("Deploy the Gateway", "gateway", True, True),
    ("Deploy the Gateway", "gate", True, False),
    ("Deploy the Gateway", "gateway deploy", False, True),
    ("Deploy the Gateway", "the", True, True),
    ("Deploy the Gateway", '"deploy the"', False, True),
    ("Deploy the Gateway", '"the deploy"', False, False),
    ("Deploy the Gateway", "deploy -gateway", False, False),
    ("Deploy the Gateway", "deploy -proxy", False, True),
    ("Deploy the Gateway", "-proxy", False, True),
    ("Deploy the Gateway", 'deploy -"the gateway"', False, False),
    ("Deploy the Gateway", '-"gateway the" deploy', False, True),
    ("Deploy the Gateway", 'deploy - "the gateway"', False, True),
    ("Deploy the Gateway", "proxy or gateway", False, True),
    ("Deploy the Gateway", "proxy-or-gateway", False, False),
    ("Deploy the Gateway", "deployed", False, False),
    ("Deploy the Gateway", 'deploy "', False, True),
    ("run snake_case now", "snake_case", True, True),
    ("run snake_case now", "case", True, True),
    ("run snake_case now", "snake case", False, True),
    ("well-known", "known", True, True),
    ("well-known", "well-known", True, True),
    ("a well-known fact", "fact -well-known", False, False),
    ("a known fact", "fact -well-known", False, True),
    ("a well fact", "fact -well-known", False, True),
    ("a known fact", "fact\u00a0-known", False, False),
    ("mail ann@example.org", "mail -ann@example.org", False, False),
    ("mail bob@example.org", "mail -ann@example.org", False, True),
    ("see https://example.org/a/b.html?q=1", "example", True, True),
    ("see https://example.org/a/b.html?q=1", "https://example.org/a", True, True),
    ("mail ann@example.org", "ann@example.org", True, True),
    ("pass --verbose or -5", "--verbose", True, True),
    ("pass --verbose or -5", '"-5"', False, True),
    ("deploy .env now", "deploy -.env", False, False),
    ("deploy now", "deploy -.env", False, True),
    ("deploy now", "deploy -#urgent", False, True),
    ("deploy #urgent now", "deploy -#urgent", False, False),
    ("deploy (foo)", "deploy -(foo)", False, False),
    ("3.14 is pi", "3.14", True, True),
    ("it's fine", "it's", True, True),
    ("100% sure", "%", True, InvalidInputError),
    ("100 sure", "%", False, InvalidInputError),
    ("a_b", "_", True, InvalidInputError),
    ("ab", "_", False, InvalidInputError),
    ("C:\\temp", "\\", True, InvalidInputError),
    ("C:\\temp", "C:\\temp", True, True),
    ("我喜欢用Python编程", "Python", True, False),
    ("我喜欢用Python编程", "喜欢", True, False),
    ("東京 タワー", "タワー", True, True),
    ("launch 🚀 now", "🚀", True, None),
    ("Straße", "STRASSE", False, False),
    ("Straße", "straße", True, True),
    ("Cafe\u0301", "caf\u00e9", False, False),
    ("Cafe\u0301", "cafe\u0301", True, None),
    ("istanbul", "ISTANBUL", True, True),
    ("tab\there", "tab\there", True, True),
    ("  two  blanks ", "two  blanks", True, True),
    ("  two  blanks ", "two blanks", False, True),
]
"""Queries of both modes, with None where the answer depends on the locale of the database."""


@pytest.mark.owner
@pytest.mark.parametrize(("content", "query", "is_part", "has_words"), SIDE_BY_SIDE)
async def test_both_modes_side_by_side(
    indexed: Talk, content: str, query: str, is_part: bool, has_words: bool | type[Exception] | None
) -> None:
    """Mode substring finds the query as it is written, mode words all its words in any order."""
    await indexed.append(content)
    await indexed.append("something else")
    expected = " ".join(content.split())
    assert await found(indexed, query) == ([expected] if is_part else [])
    if isinstance(has_words, type):
        with pytest.raises(has_words, match="no word"):
            await found(indexed, query, "words")
    elif has_words is not None:
        answer = await found(indexed, query, "words")
        assert [each for each in answer if each != "something else"] == ([expected] if has_words else [])


async def test_substring_finds_what_ilike_finds(talk: Talk) -> None:
    """In the locale of the database, mode substring folds the case as ILIKE does."""
    letters = ["ÄÖÜ", "äöü", "İI", "iı", "ΣΑΣ", "σας", "ДА", "да", "ǅ", "ß", "ẞ", "ﬁ", "Ａ", "100%", "a_b", "\\"]  # noqa: RUF001
    for each in letters:
        await talk.append(f"x{each}y")
    for each in letters:
        escaped = each.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        rows = await talk.db.fetch(
            "select seq from chatdb.messages where content ilike '%' || $1 || '%' order by seq desc",
            escaped,
        )
        answer = await talk.search_messages(query=each)
        assert sorted((each.seq for each in answer), reverse=True) == [row["seq"] for row in rows], each


@pytest.mark.owner
@both_modes
@pytest.mark.parametrize("is_copy", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5, 7, 100])
async def test_pages(indexed: Talk, mode: Any, limit: int, is_copy: bool) -> None:
    """Pages have every match once, newest first, also among messages of one time in several conversations."""
    start = datetime(2026, 3, 1, tzinfo=UTC)
    talks = [indexed]
    for _ in range(2):
        made = await chatdb.create_conversation(indexed.db, user_id="alice")
        talks.append(Talk(indexed.db, made))
    for number in range(18):
        message = await talks[number % 3].append(f"needle {number}")
        await indexed.db.execute(
            "update chatdb.messages set created_at = $2 where id = $1",
            message.id,
            start + timedelta(hours=number * 7 % 18 // 4),
        )
    rows = await indexed.db.fetch(
        "select conversation_id, seq, created_at from chatdb.messages where user_id = 'alice'"
    )
    for arguments, count in (
        ({"user_id": "alice"}, 18),
        ({"user_id": "alice", "conversation_id": talks[1].conversation.id}, 6),
    ):
        seen: list[Match] = []
        after: Match | str | None = None
        while page := await chatdb.search_messages(
            indexed.db, **arguments, query="needle", limit=limit, after=after, mode=mode
        ):
            assert len(page) <= limit
            seen += page
            after = Match.model_validate_json(page[-1].model_dump_json()) if is_copy else page[-1].cursor
        own = arguments.get("conversation_id")
        places = [(row["created_at"], row["conversation_id"], row["seq"]) for row in rows]
        expected = sorted((each for each in places if own in {None, each[1]}), reverse=True)
        assert [(each.created_at, each.conversation_id, each.seq) for each in seen] == expected
        assert len(seen) == count


@pytest.mark.owner
@both_modes
async def test_streaming_messages_are_left_out(indexed: Talk, mode: Any) -> None:
    """A message is found once it is finished or aborted, not while it is streaming."""
    for is_aborted in (False, True):
        started = await indexed.start_message()
        await indexed.extend_message(seq=started.seq, offset=0, text="needle")
        assert len(await found(indexed, "needle", mode)) == is_aborted
        if mode == "words":  # its stored text is still empty, and so does not have the word
            assert len(await found(indexed, "-other", mode)) == is_aborted
        await indexed.finish_message(seq=started.seq, aborted=is_aborted)
        assert len(await found(indexed, "needle", mode)) == 1 + is_aborted


@pytest.mark.owner
@both_modes
async def test_another_users_messages_are_not_found(indexed: Talk, mode: Any) -> None:
    """Another user finds nothing, and a conversation that the user does not have is reported as missing."""
    await indexed.append("needle")
    other = await chatdb.create_conversation(indexed.db, user_id="bob", key="theirs")
    assert await chatdb.search_messages(indexed.db, user_id="bob", query="needle", mode=mode) == []
    assert await chatdb.search_messages(indexed.db, user_id="nobody", query="needle", mode=mode) == []
    at: dict[str, Any] = {"user_id": "bob", "query": "needle", "mode": mode}
    assert await chatdb.search_messages(indexed.db, **at, conversation_id=other.id) == []
    for place in ({"conversation_id": indexed.conversation.id}, {"conversation_id": -1}, {"conversation_key": "none"}):
        with pytest.raises(ConversationNotFoundError):
            await chatdb.search_messages(indexed.db, **at, **place)


CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F)]))
CONTROLS += "".join(map(chr, range(0x2066, 0x206A)))


@pytest.mark.owner
@both_modes
async def test_a_snippet_shows_the_place(indexed: Talk, mode: Any) -> None:
    """A snippet has about 200 characters around the first place, in one line, with an ellipsis where it is cut."""
    for before, after in ((0, 0), (0, 500), (500, 0), (500, 500), (60_000, 30_000), (30, 100), (79, 114), (80, 115)):
        await indexed.append("word " * (before // 5) + "x" * (before % 5) + " Needle " + "y" * after)
        [snippet, *_] = await found(indexed, "needle", mode)
        assert "Needle" in snippet
        assert len(snippet) <= 202
        assert snippet.startswith("…") == (before >= 80 and before + after + 8 > 200)
        assert snippet.endswith("…") == (after >= 114 and before + after + 8 > 200)
        assert len(snippet) > 190 or "…" not in snippet


@pytest.mark.owner
@both_modes
async def test_a_snippet_has_no_control_characters(indexed: Talk, mode: Any) -> None:
    """Control characters, line breaks and those that change the direction of the text become single blanks."""
    await indexed.append(f"a{CONTROLS}b needle \n\n\t c\u00a0d")
    [snippet] = await found(indexed, "needle", mode)
    assert snippet == "a b needle c d"


@pytest.mark.owner
@both_modes
@pytest.mark.parametrize("cluster", ["e\u0301", "👍🏽", "👩‍👧", "ち\u3099", "✌\ufe0f"])
@pytest.mark.parametrize("shift", range(4))
async def test_a_snippet_cuts_no_cluster(indexed: Talk, mode: Any, cluster: str, shift: int) -> None:
    """A snippet neither begins nor ends within a character of several code points."""
    await indexed.append("." * shift + cluster * 200 + " needle " + "." * shift + cluster * 200)
    [snippet] = await found(indexed, "needle", mode)
    inside = snippet.strip("…").replace(" needle ", "").replace(".", "")
    assert inside.endswith(cluster)
    assert inside.startswith((cluster, cluster[-1])) or cluster == "👩‍👧"
    assert not unicodedata.combining(inside[0])
    assert inside[0] not in "\u200d\ufe0f🏽"


async def test_a_snippet_finds_its_place_behind_many_capitals(talk: Talk) -> None:
    """A dotted capital I, of which ICU makes two characters, does not move the place."""
    await talk.append("İ" * 1000 + " needle " + "İ" * 1000)
    [match] = await talk.search_messages(query="NEEDLE")
    assert " needle " in match.snippet


@pytest.mark.owner
async def test_a_snippet_prefers_a_whole_word(indexed: Talk) -> None:
    """In mode words a snippet shows a word of the query, not one that only contains it, or else its beginning."""
    await indexed.append("cats " * 100 + "(cat) " + "dogs " * 100)
    for query in ("cat", "CAT", "dogs -bird cat", "-bird cat"):
        [snippet] = await found(indexed, query, "words")
        assert ("(cat)" in snippet) or query.startswith("dogs")
    [snippet] = await found(indexed, "-bird", "words")
    assert snippet.startswith("cats cats")


@pytest.mark.owner
async def test_words_reads_the_first_100_000_characters(indexed: Talk) -> None:
    """Mode words finds what is within 100,000 characters, mode substring finds the rest too."""
    await indexed.append("x" * 99_993 + " inside beyond")
    assert len(await found(indexed, "beyond")) == 1
    assert await found(indexed, "beyond", "words") == []
    await indexed.append("y " * 49_990 + "within 世 " + "ab_" * 1_000_000)
    assert len(await found(indexed, "within", "words")) == 1


async def test_words_needs_its_index(talk: Talk) -> None:
    """Without the index, mode words tells in one round trip which command creates it, and reads no message."""
    await talk.append("needle")
    db = Counting(talk.db)
    for place in ({}, {"conversation_id": talk.conversation.id}):
        with pytest.raises(ConfigurationError, match="run chatdb search-index create"):
            await chatdb.search_messages(db, user_id="alice", query="needle", mode="words", **place)
    assert len(db.statements) == 2
    arguments = ("alice", "needle", ["needle"], None, None, None, 20)
    plan = json.dumps(await explained(talk.db, db.statements[0], arguments))
    messages = plan[: plan.index('"messages"')].rindex("{")
    assert '"Actual Loops": 0' in plan[messages : plan.index("}", messages)]


async def explained(db: Any, statement: str, arguments: tuple[Any, ...]) -> Any:
    """Return the plan of a statement, with what it read."""
    [row] = await db.fetch(f"explain (analyze, buffers, format json) {statement}", *arguments)
    return json.loads(row[0])


@pytest.mark.owner
async def test_an_invalid_index_is_no_index(indexed: Talk) -> None:
    """An index that a killed run left invalid is not used."""
    await indexed.append("needle")
    await indexed.db.execute(
        "update pg_index set indisvalid = false where indexrelid = 'chatdb.ix_messages_search'::regclass"
    )
    with pytest.raises(ConfigurationError, match="run chatdb search-index create"):
        await indexed.search_messages(query="needle", mode="words")


@pytest.mark.owner
async def test_a_word_that_the_server_does_not_see(indexed: Talk) -> None:
    """A query in which only the server knows that there is no word is refused too."""
    await indexed.append("needle")
    for query in ("。。。", "…", "«»"):
        # in the locale C each of these is a letter
        has_word = await indexed.db.fetchval("select numnode(websearch_to_tsquery('simple', $1)) > 0", query)
        if has_word:
            assert await found(indexed, query, "words") == []
            continue
        for place in ({}, {"conversation_id": indexed.conversation.id}):
            with pytest.raises(InvalidInputError, match="query: contains no word"):
                await chatdb.search_messages(indexed.db, user_id="alice", query=query, mode="words", **place)


QUERIES: dict[str, tuple[Any, str]] = {
    "nothing": ("", "1 to 1,000 characters"),
    "blanks": (" \t\n\u3000", "white space"),
    "too long": ("x" * 1001, "1 to 1,000 characters"),
    "a megabyte": ("x" * 1024 * 1024, "1 to 1,000 characters"),
    "NUL": ("a\0b", "NUL character at position 1"),
    "a lone surrogate": ("a\ud83d", "lone surrogate at position 1"),
    "bytes": (b"x", "must be a str, not bytes"),
    "None": (None, "must be a str, not NoneType"),
    "a list": (["x"], "must be a str, not list"),
}
"""Queries that no mode takes."""


@both_modes
@pytest.mark.parametrize("name", QUERIES)
async def test_a_bad_query_is_not_sent(name: str, mode: Any) -> None:
    """A query that cannot be searched for is an error that names the parameter and not the text."""
    query, problem = QUERIES[name]
    with pytest.raises(InvalidInputError, match=problem) as raised:
        await chatdb.search_messages(Counting(None), user_id="alice", query=query, mode=mode)
    assert str(raised.value).startswith("query: ")


@pytest.mark.parametrize(
    "query", ["%", "_", "\\", "-", "--", "...", '"', '""', "!&|()", "<->", ":*", "'", "_-+./:@~&<"]
)
async def test_punctuation_is_not_sent_as_words(query: str) -> None:
    """A query of punctuation is refused in mode words before anything is sent."""
    with pytest.raises(InvalidInputError, match="query: contains no word"):
        await chatdb.search_messages(Counting(None), user_id="alice", query=query, mode="words")


MATCH = Match(conversation_id=1, seq=2, role="user", created_at=datetime(2026, 1, 1, tzinfo=UTC), snippet="")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"limit": 0}, "limit: must be between 1 and 10,000"),
        ({"limit": 10_001}, "limit: must be between 1 and 10,000"),
        ({"mode": "regex"}, "mode: must be substring or words"),
        ({"mode": None}, "mode: must be a str"),
        ({"conversation_id": 1, "conversation_key": "k"}, "conversation_key: must not be given together"),
        ({"conversation_id": "1"}, "conversation_id: must be an int"),
        ({"conversation_key": ""}, "conversation_key: must be 1 to 255 characters"),
        ({"after": NOBODYS}, "after: must be the last Match of the previous page"),
        ({"after": NOBODYS.cursor}, "after: is a cursor of list_conversations"),
        ({"after": f"s2{MATCH.cursor[2:]}"}, "after: is a cursor of another version"),
        ({"after": MATCH.cursor[:-1]}, "after: is not a cursor that chatdb made"),
        ({"after": NOBODYS.etag}, "after: is not a cursor that chatdb made"),
        ({"after": chatdb.records.encode_token("s1", 2**62, 1, 1)}, "after: is not a cursor that chatdb made"),
        ({"after": MATCH.model_copy(update={"created_at": datetime(2026, 1, 1)})}, "after: must be a Match as"),  # noqa: DTZ001
        ({"after": 7}, "after: must be the last Match of the previous page"),
    ],
)
@both_modes
async def test_bad_arguments_are_not_sent(arguments: dict[str, Any], problem: str, mode: Any) -> None:
    """Other bad arguments are errors that name the parameter."""
    with pytest.raises(InvalidInputError, match=problem):
        await chatdb.search_messages(
            Counting(None), **({"user_id": "alice", "query": "needle", "mode": mode} | arguments)
        )


async def test_a_cursor_of_a_search_continues_no_list(tx: asyncpg.Connection) -> None:
    """A cursor of search_messages is refused by list_conversations, which says where it comes from."""
    with pytest.raises(InvalidInputError, match="after: is a cursor of search_messages"):
        await chatdb.list_conversations(tx, user_id="alice", after=MATCH.cursor)


@pytest.mark.owner
@both_modes
async def test_hostile_queries_are_only_text(indexed: Talk, mode: Any) -> None:
    """Quotes, operators and SQL in a query neither fail nor match everything."""
    await indexed.append("needle")
    for query in (
        "a' or '1'='1",
        'a"; drop table x; --',
        "a & | ! ( b",
        "a <-> b:*",
        "%a%",
        "a" * 1000,
        "or or or a",
        "-" * 999 + "a",
    ):
        assert await found(indexed, query, mode) == []


@pytest.mark.owner
@both_modes
async def test_backslashes_need_no_standard_strings(indexed: Talk, mode: Any) -> None:
    """The statements mean the same with standard_conforming_strings off."""
    await indexed.append("C:\\new needle\\table")
    expected = await found(indexed, "needle", mode)
    await indexed.db.execute("set local standard_conforming_strings = off; set local escape_string_warning = off")
    assert await found(indexed.through(indexed.db), "needle", mode) == expected == ["C:\\new needle\\table"]


def test_a_match_shows_no_text() -> None:
    """The representation of a match has its place but not its snippet."""
    match = MATCH.model_copy(update={"snippet": "secret"})
    assert "secret" not in repr(match)
    assert "seq=2" in repr(match)
    assert isinstance(NOBODYS, Conversation)
