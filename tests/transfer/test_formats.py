"""The exports of each product: told apart, and shown as their user saw them."""

from __future__ import annotations

import copy
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from chatdb.errors import InvalidInputError
from chatdb.formats import exports, gemini, html, items, trees
from chatdb.formats.items import Changed, Skipped, SourceConversation, SourceMessage
from chatdb.transfer import files, json_objects
from tests.support.samples import (
    AI_STUDIO,
    CHATGPT,
    CLAUDE,
    DEEPSEEK,
    GEMINI,
    GROK,
    LIBRECHAT,
    MESSAGES,
    OPEN_WEBUI,
    SAMPLES,
    UI_MESSAGES,
)

pytestmark = pytest.mark.server_independent


def read(value: Any, name: str | None = None) -> list[Any]:
    """Return the items of a file with this JSON value."""
    file = io.BytesIO(value if isinstance(value, bytes) else json.dumps(value).encode())
    return list(files.read(file, name or files.detect(file)))


def shown(found: list[Any]) -> list[str]:
    """Return a line for each message: its role, whatever marks it, and its text."""
    lines: list[str] = []
    for message in found:
        if isinstance(message, SourceMessage):
            about = json.loads(message.metadata or "{}")
            marks = [about.get("type"), "hidden" if about.get("hidden") else None, message.state]
            lines.append(" ".join([message.role, *filter(None, marks)]) + f": {message.content}")
    return lines


SEEN = {
    "chatgpt": [
        "system hidden: A baker",
        "user: [image: loaf.png]\nWhich flour?\n[file: recipe.pdf]",
        'assistant tool_call: {"q": "flour"}',
        "tool tool_result: Two pages",
        "assistant reasoning: Weighing\nRye?",
        "assistant: Rye [Flours](https://example.invalid/flours), or spelt. Page 3[recipe.pdf] agrees.",
        "assistant aborted: Wheat",
    ],
    "claude": [
        "user: Why two tides?\n[file: pasted text]\n[image: moon.jpg]",
        "assistant: Spoken answer",
        "assistant reasoning: Gravity gradient.",
        'assistant tool_call: {"query": "tides"}',
        "tool tool_result: A page",
        "assistant: Both sides are stretched ([Tides](https://example.invalid/tides)).",
    ],
    "open-webui": [
        "user: 2+2?",
        "assistant reasoning: Add them.",
        'assistant tool_call: {"a": 2}',
        "tool tool_result: 4",
        "assistant: 4",
        "assistant reasoning: Hm.",
        "assistant aborted: Four",
    ],
    "librechat": [
        "user: Hi\n[file: a.txt]",
        "assistant reasoning: A greeting.",
        "assistant: Hello ",
        "assistant tool_call: {}",
        "tool tool_result: noon",
        "assistant reasoning: Hm.",
        "assistant aborted: Hey",
    ],
    "gemini": [
        "user: How do I boil an egg?",
        "assistant: Seven minutes.\n\nIn water.",
        "user: And a duck egg?",
        "assistant: - Nine minutes",
        "user: Which tea?\n[image: pot.png]",
        "assistant: Green & [white](https://example.invalid/tea)",
    ],
    "ai-studio": ["system: Be brief.", "user: Egg?", "assistant reasoning: Hm.", "assistant: Seven."],
    "grok": [
        "user: Rain?",
        "assistant reasoning: Clouds.",
        "assistant: Yes ([Sky](https://example.invalid/sky)).",
    ],
    "deepseek": [
        "user: Why?\n[file: a.csv]",
        "tool tool_result: [News](https://example.invalid/n)",
        "assistant reasoning: Hm.",
        "assistant: Fear ([News](https://example.invalid/n)).",
    ],
    "messages": [
        "system: Be brief.",
        "user: Time?\n[image]",
        'assistant tool_call: {"zone": "UTC"}',
        "tool tool_result: noon",
        "assistant: Noon.",
    ],
    "ui-messages": [
        "user: Egg?",
        "assistant reasoning: Hm",
        'assistant tool_call: {"minutes": 7}',
        "tool tool_result: set",
        "assistant: Seven.\n[Eggs](https://example.invalid/egg)\n[image: egg.png]",
    ],
}
HEADS: dict[str, tuple[str, str | None, dict[str, str], tuple[bool, bool]]] = {
    "chatgpt": ("chatgpt:g-1", "Bread", {"model": "gpt-x", "gizmo_id": "g-baker"}, (True, False)),
    "claude": ("claude:c-1", "Tides", {"model": "claude-x"}, (False, True)),
    "open-webui": ("open-webui:w-1", "Sums", {"model": "llama"}, (False, True)),
    "librechat": ("librechat:l-1", "Hello", {"model": "gpt-z"}, (False, False)),
    "gemini": ("gemini:abc123", "How do I boil an egg?", {}, (False, False)),
    "ai-studio": ("gemini:ai-studio:", None, {"model": "models/gemini-x"}, (False, False)),
    "grok": ("grok:x-1", "Rain", {}, (False, True)),
    "deepseek": ("deepseek:d-1", "Stocks", {}, (False, False)),
    "messages": ("messages:z-1:", None, {"model": "gpt-x"}, (False, False)),
    "ui-messages": ("messages:first:msg-aaaaaaaa:", None, {}, (False, False)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_conversation_is_shown_as_its_user_saw_it(name: str) -> None:
    """Hidden context, reasoning and tools are marked; answers are texts with names and links, and nothing else."""
    kind, value = SAMPLES[name]
    found = read(value)
    assert files.detect(io.BytesIO(json.dumps(value).encode())) == kind
    assert shown(found) == SEEN[name]
    head = next(item for item in found if isinstance(item, SourceConversation))
    key, title, metadata, flags = HEADS[name]
    assert head.key is not None
    assert head.key.startswith(key)
    assert (head.title, (head.archived_at is not None, head.pinned_at is not None)) == (title, flags)
    imported = {"imported_title": title, "imported_archived": flags[0], "imported_pinned": flags[1]}
    assert json.loads(head.metadata or "{}") == metadata | {name: value for name, value in imported.items() if value}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_large_conversation_is_read_like_a_small_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the window, messages stay JSON until they are needed, and nothing else changes."""
    expected = read(SAMPLES[name][1])
    kept: list[items.Raw] = []

    def raw(text: str) -> items.Raw:
        kept.append(items.Raw(text))
        return kept[-1]

    monkeypatch.setattr(json_objects, "Raw", raw)
    monkeypatch.setattr(json_objects, "_CHUNK", 50)
    for window in (60, 200, 400):
        monkeypatch.setattr(json_objects, "_WINDOW", window)
        assert read(json.dumps(SAMPLES[name][1], ensure_ascii=False).encode()) == expected
    assert kept or name == "gemini"  # whose conversations are put together from entries


def _in_tree(value: Any) -> list[Any]:
    return [node["message"] for node in value[0]["mapping"].values() if node["message"]]


@pytest.mark.parametrize(
    ("value", "originals"),
    [
        (CHATGPT, _in_tree(CHATGPT)),
        (CLAUDE, CLAUDE[0]["chat_messages"]),
        (OPEN_WEBUI, [*OPEN_WEBUI[0]["chat"]["history"]["messages"].values()]),
        (DEEPSEEK, _in_tree(DEEPSEEK)),
        (GROK, [each["response"] for each in GROK["conversations"][0]["responses"]]),
        (GEMINI, [GEMINI[0], GEMINI[1], GEMINI[3]]),
        (UI_MESSAGES, UI_MESSAGES),
        (MESSAGES, [each for each in MESSAGES[0]["messages"] if not isinstance(each["content"], str)]),
    ],
)  # fmt: skip
def test_the_foreign_message_is_kept(value: Any, originals: list[Any]) -> None:
    """It is the payload of its first text, with its fields in order, unless role and text are all of it."""
    payloads = [item.payload for item in read(value) if isinstance(item, SourceMessage)]
    assert {json.dumps(each, ensure_ascii=False) for each in originals} <= {*payloads}


@pytest.mark.parametrize("name", SAMPLES)
def test_keys_are_distinct_and_the_same_each_time(name: str) -> None:
    """A second import finds what the first one stored."""
    once, again = read(SAMPLES[name][1]), read(SAMPLES[name][1])
    assert once == again
    keys = [item.key for item in once if isinstance(item, SourceMessage) and item.key]
    assert len(keys) == len({*keys})


def test_branches_and_the_line_that_the_user_saw() -> None:
    """The head is the current node, or else the newest leaf."""
    for value, texts in ((CHATGPT, "Rye"), (CLAUDE, "Both sides"), (OPEN_WEBUI, "4"), (LIBRECHAT, "Hey")):
        found = read(value)
        (head,) = [item for item in found if isinstance(item, SourceConversation)]
        (last,) = [
            item for item in found if isinstance(item, SourceMessage) and item.seq == (head.head_seq or head.last_seq)
        ]
        assert last.content.startswith(texts)
    leaf = [CLAUDE[0] | {"current_leaf_message_uuid": "m3"}]
    (head,) = [item for item in read(leaf) if isinstance(item, SourceConversation)]
    assert head.head_seq == 2


def test_gemini_says_what_it_could_not_place() -> None:
    """An entry without a thread is a conversation of its own, and another activity is skipped."""
    found = read(GEMINI)
    assert [item for item in found if isinstance(item, Skipped | Changed)] == [
        Skipped(gemini.NOT_A_PROMPT, messages=1, place="entry of 2025-06-01T10:00:20Z"),
        Changed(gemini.NO_THREAD, conversations=1, place="entry of 2025-06-01 10:00:30+00:00"),
    ]
    others = read([GEMINI[0] | {"header": "Search", "products": ["Search"]}, GEMINI[0]], "gemini")
    assert others[0] == Skipped(gemini.OTHER_PRODUCT, messages=1, place="entry 1")


@pytest.mark.parametrize(
    ("titles", "prompt"),
    [
        (["Du hast gefragt: Ei?", "Du hast gefragt: Tee und Ei?", "Du hast gefragt: Brot"], "Tee und Ei?"),
        (["「Ei?」と入力しました", "「Tee?」と入力しました", "「Brot」と入力しました"], "Tee?"),
        (["Prompted a", "Prompted Why?", "Prompted c"], "Why?"),
    ],
)
def test_the_words_before_a_prompt_are_learned(titles: list[str], prompt: str) -> None:
    """Takeout writes them in the account's language; without three different prompts, they are kept."""
    assert gemini.Prefix.of(titles).prompt_of(titles[1]) == prompt
    assert gemini.Prefix.of(["Ei a", "Ei b"]).prompt_of("Ei a") is None


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<p>a</p><p>b<br>c</p>", "a\n\nb\nc"),
        ("a &amp; b&nbsp;c", "a & b\xa0c"),
        ("<ol><li>x<ul><li>y</li></ul></li><li>z</li></ol>", "1. x\n  - y\n2. z"),
        ("<h2>T</h2><pre>if a:\n    b\n</pre>", "T\n\nif a:\n    b"),
        ('<a href="https://a.invalid">A</a> <a href="https://b.invalid">https://b.invalid</a>',
         "[A](https://a.invalid) https://b.invalid"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>", "a | b\nc | d"),
        ("<script>x</script><style>y</style>z", "z"),
        ('<img src="https://a.invalid/p.png" alt="A plan">', "[image: A plan]"),
        ("<p>cut <b>off", "cut off"),
    ],
)  # fmt: skip
def test_html_becomes_text(source: str, text: str) -> None:
    """Blocks are lines, lists have marks, and links are kept."""
    assert html.text_of(source) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000.25, "2023-11-14T22:13:20.250000+00:00"),
        (1_700_000_000_250, "2023-11-14T22:13:20.250000+00:00"),
        ("2023-11-14T22:13:20Z", "2023-11-14T22:13:20+00:00"),
        ("2023-11-14T22:13:20.5+08:00", "2023-11-14T14:13:20.500000+00:00"),
        ("2023-11-14T22:13:20", "2023-11-14T22:13:20+00:00"),
        ({"$date": {"$numberLong": "1700000000250"}}, "2023-11-14T22:13:20.250000+00:00"),
        ({"$date": "2023-11-14T22:13:20Z"}, "2023-11-14T22:13:20+00:00"),
    ],
)
def test_times(value: object, expected: str) -> None:
    """Each way of writing a time is read."""
    time = items.time_of(value)
    assert time is not None
    assert time.isoformat() == expected


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, "", "soon", "2023-13-45T00:00:00", {}, {"$date": []}, float("nan")]
)
def test_what_is_no_time(value: object) -> None:
    """Anything else is no time."""
    assert items.time_of(value) is None


def test_every_format_says_how_to_get_it() -> None:
    """A sample of each is read above."""
    assert {kind for kind, _ in SAMPLES.values()} | {"sharegpt"} == {*exports.FORMATS}
    assert all(each.product and each.how for each in exports.FORMATS.values())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (CHATGPT[0], "chatgpt"),
        ({"conversations": CHATGPT}, "chatgpt"),
        ([{"title": "no tree"}, *CHATGPT], "chatgpt"),
        (CLAUDE[0], "claude"),
        ({"data": CLAUDE}, "claude"),
        (OPEN_WEBUI[0]["chat"], "open-webui"),
        (GROK["conversations"], "grok"),
        (AI_STUDIO, "gemini"),
        ([UI_MESSAGES], "messages"),
        ({"messages": UI_MESSAGES}, "messages"),
    ],
)  # fmt: skip
def test_the_same_export_in_another_wrapping(value: Any, kind: str) -> None:
    """One conversation, or an object around all, is recognized, and gives the same messages."""
    found = read(value)
    name = next(name for name, (each, _) in SAMPLES.items() if each == kind)
    name = {"gemini": "ai-studio", "messages": "ui-messages"}.get(kind, name)
    assert files.detect(io.BytesIO(json.dumps(value).encode())) == kind
    assert shown(found) == SEEN[name]


def test_lines_of_messages_are_one_conversation() -> None:
    """JSON lines with a message each; one that is broken is skipped alone."""
    first, second = map(json.dumps, UI_MESSAGES)
    assert shown(read(f"{first}\n{second}".encode())) == SEEN["ui-messages"]
    found = read(f"{first}\n{{broken}}\n{second}".encode())
    assert shown(found) == SEEN["ui-messages"]
    assert found[0] == Skipped("line of invalid JSON", messages=1)


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ({f"{number}": {"x": 1} for number in range(9)}, "objects with the fields other names"),
        ({"a": 1, "A text": 2}, 'objects with the fields "a", others'),
        ({"message": {"role": "user", "content": "x"}}, 'objects with the fields "message"'),
    ],
)  # fmt: skip
def test_an_unknown_object_is_described(value: Any, described: str) -> None:
    """The error lists names of fields, but nothing that could be a text."""
    with pytest.raises(InvalidInputError) as caught:
        files.detect(io.BytesIO(json.dumps(value).encode()))
    assert f"it has {described}. chatdb reads" in str(caught.value)


def test_the_format_of_a_large_first_message() -> None:
    """Its text may be longer than what detection reads."""
    value = [{"messages": [{"role": "user", "content": "a" * 2**21}]}]
    assert files.detect(io.BytesIO(json.dumps(value).encode())) == "messages"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(encoding: str) -> None:
    """The error says what to do."""
    with pytest.raises(InvalidInputError, match="looks like UTF-16: save it as UTF-8"):
        files.detect(io.BytesIO(json.dumps(CLAUDE).encode(encoding)))


def test_a_fault_is_told_from_an_unknown_format() -> None:
    """The error of broken JSON has its position, even if nothing before it shows the format."""
    with pytest.raises(InvalidInputError, match="invalid JSON at character 14"):
        files.detect(io.BytesIO(b'[{"title": 1, oops}]'))


def test_messages_in_a_circle() -> None:
    """The circle is cut, and counted."""
    circle = copy.deepcopy(CHATGPT)
    circle[0]["mapping"]["n1"]["parent"] = "n7"
    found = read(circle)
    assert len(shown(found)) == len(SEEN["chatgpt"])
    assert found[-1] == Changed(trees.RING, conversations=1, place='conversation 1 "Bread"')
    assert trees.RING not in {item.reason for item in read(CHATGPT) if isinstance(item, Changed)}


def test_details_of_a_conversation() -> None:
    """Long ones are kept, such as a summary or the tools of a data set; what is longer still is counted."""
    (head,) = [one for one in read([CLAUDE[0] | {"summary": "s" * 20_000}]) if isinstance(one, SourceConversation)]
    assert json.loads(head.metadata or "")["summary"] == "s" * 20_000
    found = read([CLAUDE[0] | {"summary": "s" * 20_001}])
    assert "summary" not in json.loads(found[0].metadata)
    assert found[-1] == Changed(trees.LONG_DETAIL, conversations=1, place='conversation 1 "Tides"')
    for name in ("conversations", "messages"):
        tools = [{"name": "clock", "description": "d" * 300}]
        said = {"from": "human", "value": "a"} if name == "conversations" else {"role": "user", "content": "a"}
        assert json.loads(json.loads(read([{name: [said], "tools": tools}])[0].metadata)["tools"]) == tools


def test_files_of_a_data_set() -> None:
    """Images are named where the texts have their marks, and the others at the first question."""
    turns = [
        {"from": "human", "value": "<image> or <image>?<video>"},
        {"from": "gpt", "value": "<image>"},
        {"from": "human", "value": "<image>"},
    ]
    images = ["a/1.png", {"path": "2.png", "bytes": None}]
    found = read([{"conversations": turns, "images": images, "audios": ["x" * 256]}])
    assert shown(found) == [
        "user: [image: a/1.png] or [image: 2.png]?<video>\n[audio: unnamed]",
        "assistant: <image>",
        "user: <image>",
    ]
    assert json.loads(found[1].payload) == {"value": "<image> or <image>?<video>"}
    assert found[0].key != read([{"conversations": turns}])[0].key
    ollama = {"messages": [{"role": "user", "content": "What?", "images": ["iVBORw0K" * 99]}]}
    assert shown(read([ollama])) == ["user: What?\n[image: unnamed]"]
    spoken = {"messages": [{"role": "assistant", "content": None, "audio": {"id": "a", "transcript": "Hello."}}]}
    assert shown(read([spoken])) == ["assistant: Hello."]


def test_every_member_of_an_archive_is_read(tmp_path: Path) -> None:
    """Also those whose names repeat, or say that they belong elsewhere: names are only shown."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("conversations.json", "../../conversations.json", "/etc/conversations.json"):
            archive.writestr(name, json.dumps(CLAUDE))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("conversations.json", json.dumps(CLAUDE))
    with files.opened(path) as parts:
        assert len(parts) == 4
        for part in parts:
            with part.opened() as file:
                assert shown(list(files.read(file, "claude"))) == SEEN["claude"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"<!DOCTYPE html><html>", "looks like a web page"),
        (b"%PDF-1.7", "looks like a PDF"),
        (b"SQLite format 3\0", "looks like an SQLite database"),
        (b"a" * 257 + b"ustar", "tar archive: unpack it first"),
        (b'[{"name": "x", "size": 1}]', 'a list of objects with the fields "name", "size". chatdb reads chatgpt, '),
        (b"[1, 2]", "a list of text or numbers"),
    ],
)
def test_an_unknown_file_is_described(data: bytes, problem: str) -> None:
    """The error says what the file looks like, without its texts."""
    with pytest.raises(InvalidInputError, match=problem):
        files.detect(io.BytesIO(data))


def test_a_compressed_file(tmp_path: Path) -> None:
    """A .gz file is read without unpacking it, but not one that expands too far or is cut off."""
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(CLAUDE).encode()))
    with files.opened(path) as (part,), part.opened() as file:
        assert shown(list(files.read(file, files.detect(file)))) == SEEN["claude"]
    path.write_bytes(gzip.compress(b"[" + b" " * 17 * 2**20 + b"]"))
    with (
        files.opened(path) as (part,),
        part.opened() as file,
        pytest.raises(InvalidInputError, match="expands to over"),
    ):
        list(files.read(file, "claude"))
    path.write_bytes(gzip.compress(json.dumps(CLAUDE).encode())[:-30])
    with files.opened(path) as (part,), part.opened() as file, pytest.raises(InvalidInputError, match="truncated"):
        list(files.read(file, "claude"))


def test_a_folder_is_read_like_an_archive(tmp_path: Path) -> None:
    """Beside a conversations.json, other files of its export are left alone; elsewhere, each JSON file is read."""
    texts = {
        "a/conversations.json": CLAUDE,
        "a/users.json": [{"x": 1}],
        "a/deep/data.json": [{"x": 1}],
        "b/one.json": LIBRECHAT,
        "b/10.jsonl": LIBRECHAT,
        "b/9.json": LIBRECHAT,
        "b/.hidden.json": LIBRECHAT,
        "b/notes.txt": LIBRECHAT,
        "__MACOSX/x.json": LIBRECHAT,
    }
    for name, value in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    with zipfile.ZipFile(tmp_path / "b" / "z.zip", "w") as archive:
        for name, value in texts.items():
            archive.writestr(name, json.dumps(value))
    expected = ["a/conversations.json", "b/9.json", "b/10.jsonl", "b/one.json"]
    with files.opened(tmp_path) as parts:
        assert [part.name for part in parts] == [*expected, *(f"b/z.zip/{name}" for name in expected)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="is a folder without"):
        files.opened(tmp_path / "empty").__enter__()
