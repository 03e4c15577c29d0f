"""Conversations with realistic turns, calls of tools and branches. The same seed gives the same conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Final, NamedTuple

from chatdb._core.query import Database
from chatdb._core.validate import check_bool, check_int
from chatdb.conversations import create_conversation, get_conversation
from chatdb.messages import append_messages
from chatdb.records import Conversation, NewMessage, Role

_MAX_TURNS: Final = 2_000


class _Topic(NamedTuple):
    title: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    tool: str
    arguments: Mapping[str, object]
    result: Mapping[str, object]


_TOPICS: Final = (
    _Topic(
        "Weekend in Rome",
        (
            "Plan a weekend in Rome for two people, please.",
            "What will the weather be like on Saturday?",
            "We are vegetarians. Where can we have dinner near the Pantheon?",
            "And if it rains?",
        ),
        (
            "Day 1: the Forum and the Colosseum, then dinner in Trastevere.\nDay 2: the Vatican Museums, early.",
            "Sunny, with a high of 24 °C. Take a hat for the Forum: there is hardly any shade.",
            "Two good places are within ten minutes' walk. Shall I book a table for eight o'clock?",
            "Then swap the days: the museums take about four hours, and you stay dry. 🌧️",
        ),
        "get_weather",
        {"city": "Rome", "date": "2026-05-16"},
        {"summary": "sunny", "high_celsius": 24, "low_celsius": 15},
    ),
    _Topic(
        "Order 10482 has not arrived",
        (
            "Hello, where is my order 10482?",
            "It should have come on Tuesday. Can you send it to my office instead?",
            "Müller GmbH, Hauptstraße 5, 10115 Berlin.",
            "Thanks!",
        ),
        (
            "Your parcel left our warehouse on Monday and is with the carrier in Hanover.",
            "Yes, as long as it is not out for delivery. What is the address?",
            "Done. The new address is on the label, and the parcel should arrive tomorrow before noon.",
            "You're welcome! You will get a message when it has been delivered.",
        ),
        "find_order",
        {"order_id": 10482},
        {"status": "in_transit", "carrier": "DHL", "last_scan": "Hannover"},
    ),
    _Topic(
        "Slow query",
        (
            "This query takes 4 seconds. Why?\n\n```sql\nselect * from orders where customer_id = 7 order by id;\n```",
            "Here is the plan: Seq Scan on orders (rows=2000000). What does that mean?",
            "Which index do I need?",
            "Can I create it while the service is running?",
        ),
        (
            "Probably PostgreSQL reads the whole table. Run it with `explain (analyze, buffers)` and show me the plan.",
            "There is no index on `customer_id`, so it looks at all two million rows to find a few.",
            "```sql\ncreate index concurrently on orders (customer_id, id);\n```\nIt serves the filter and the order.",
            "Yes: `concurrently` does not block writes. It only takes longer.",
        ),
        "count_rows",
        {"table": "orders", "customer_id": 7},
        {"rows": 12, "duration_ms": 4012.5},
    ),
    _Topic(
        "会議の要約",
        (
            "この会議のメモを三行で要約してください。",
            "担当者ごとに分けてもらえますか?",
            "締め切りはいつですか?",
            "ありがとうございます。",
        ),
        (
            "1. 新しい料金は四月から。\n2. サポートは週末も対応。\n3. 次回は月曜日。",
            "佐藤さん:料金表の更新。鈴木さん:サポートの勤務表。",
            "料金表は三月二十日、勤務表は三月末です。",
            "どういたしまして。",
        ),
        "search_documents",
        {"query": "会議 メモ", "limit": 3},
        {"documents": [{"id": "doc-17", "score": 0.82}, {"id": "doc-4", "score": 0.61}]},
    ),
)


class ConversationFactory:
    """
    Makes conversations. Two factories with the same `seed` make the same ones, in the same order.

    A turn is a user's message and the assistant's answer. With tools, about every third turn also has a message of the
    assistant that calls a tool, and the tool's result; their payloads are those of OpenAI's Chat Completions API.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(check_int("seed", seed, least=0))  # noqa: S311 - test data

    def messages(self, turns: int = 3, *, tools: bool = True) -> list[NewMessage]:
        """
        Return the messages of a conversation with this number of turns, 1 to 2,000, to append.

        Raises InvalidInputError.
        """
        return self._messages(self._random.choice(_TOPICS), turns, tools=tools)

    async def create(
        self,
        db: Database,
        *,
        user_id: str = "alice",
        key: str | None = None,
        turns: int = 3,
        tools: bool = True,
        versions: int = 0,
    ) -> Conversation:
        """
        Store a conversation and return it.

        `versions` is how many times the user then edited one of their messages and got another answer. Each is a
        branch, and the last one is selected. With a `key` that is already stored, the stored conversation gets only the
        versions.

        Raises InvalidInputError, or the errors of `create_conversation` and `append_messages`.
        """
        check_int("versions", versions, least=0, most=_MAX_TURNS)
        topic = self._random.choice(_TOPICS)
        messages = self._messages(topic, turns, tools=tools)
        made = await create_conversation(db, user_id=user_id, key=key, title=topic.title, messages=messages)
        asked = [seq for seq, message in enumerate(messages, 1) if message.role == "user"]
        for _ in range(versions):
            edited = self._random.choice(asked)
            await append_messages(
                db,
                user_id=user_id,
                conversation_id=made.id,
                messages=self._turn(topic, self._random.randrange(len(topic.questions)), call=False),
                parent_seq=edited - 1,
            )
        return await get_conversation(db, user_id=user_id, conversation_id=made.id) if versions else made

    def _messages(self, topic: _Topic, turns: int, *, tools: bool) -> list[NewMessage]:
        check_int("turns", turns, least=1, most=_MAX_TURNS)
        check_bool("tools", tools)
        # the first turn calls a tool, so that a short conversation has a call too
        calls = [tools and (turn == 0 or self._random.random() < 1 / 3) for turn in range(turns)]
        return [message for turn, call in enumerate(calls) for message in self._turn(topic, turn, call=call)]

    def _turn(self, topic: _Topic, turn: int, *, call: bool) -> list[NewMessage]:
        place = turn % len(topic.questions)
        return [
            _message("user", topic.questions[place]),
            *(self._call(topic) if call else []),
            _message("assistant", topic.answers[place]),
        ]

    def _call(self, topic: _Topic) -> list[NewMessage]:
        name = f"call_{self._random.getrandbits(64):016x}"
        function = {"name": topic.tool, "arguments": json.dumps(topic.arguments, ensure_ascii=False)}
        return [
            _message("assistant", "", {"tool_calls": [{"id": name, "type": "function", "function": function}]}),
            _message("tool", json.dumps(topic.result, ensure_ascii=False), {"tool_call_id": name}),
        ]


def _message(role: Role, content: str, payload: object = None) -> NewMessage:
    return NewMessage(role=role, content=content, payload=payload, token_count=len(content) // 4 + 1)
