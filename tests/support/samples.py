"""A small invented export of each product, with what a reader has to tell apart."""

from __future__ import annotations

from typing import Any

ROOT = "00000000-0000-4000-8000-000000000000"


def _node(name: str, parent: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": name, "parent": parent, "children": [], "message": message}


def _said(name: str, role: str, *parts: Any, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "author": {"role": role, "name": fields.pop("author", None)},
        "create_time": fields.pop("at", 1_700_000_000.5),
        "content": {"content_type": "text", "parts": list(parts)},
        "status": "finished_successfully",
        "metadata": {},
        "recipient": "all",
    } | fields


CHATGPT: list[dict[str, Any]] = [
    {
        "title": "Bread",
        "create_time": 1_700_000_000.0,
        "update_time": True,
        "conversation_id": "g-1",
        "current_node": "n6",
        "default_model_slug": "gpt-x",
        "gizmo_id": "g-baker",
        "is_archived": True,
        "mapping": {
            "root": _node("root", None, None),
            "n1": _node(
                "n1",
                "root",
                _said("n1", "user", content={"content_type": "user_editable_context", "user_profile": "A baker"}),
            ),
            "n2": _node(
                "n2",
                "n1",
                _said(
                    "n2",
                    "user",
                    {"content_type": "image_asset_pointer", "asset_pointer": "sediment://file_1"},
                    "Which flour?",
                    content_type="multimodal_text",
                    metadata={
                        "attachments": [
                            {"id": "file_1", "name": "loaf.png", "mime_type": "image/png"},
                            {"id": "file_2", "name": "recipe.pdf", "mime_type": "application/pdf"},
                        ]
                    },
                ),
            ),
            "n3": _node("n3", "n2", _said("n3", "assistant", '{"q": "flour"}', recipient="web.run")),
            "n4": _node("n4", "n3", _said("n4", "tool", "Two pages", author="web.run")),
            "n5": _node(
                "n5",
                "n4",
                _said(
                    "n5",
                    "assistant",
                    content={"content_type": "thoughts", "thoughts": [{"summary": "Weighing", "content": "Rye?"}]},
                ),
            ),
            "n6": _node(
                "n6",
                "n5",
                _said(
                    "n6",
                    "assistant",
                    "Rye \ue200cite\ue202turn0search0\ue201, or \ue203spelt\ue204\ue200cite\ue202turn0search9\ue201. "
                    "Page 3\u30104:2\u2020recipe.pdf\u3011 agrees.",
                    metadata={
                        "model_slug": "gpt-y",
                        "content_references": [
                            {
                                "matched_text": "\ue200cite\ue202turn0search0\ue201",
                                "alt": None,
                                "items": [{"title": "Flours", "url": "https://example.invalid/flours"}],
                            },
                            {"matched_text": " ", "alt": "x"},
                        ],
                    },
                ),
            ),
            "n7": _node("n7", "n4", _said("n7", "assistant", "Wheat", status="in_progress", at="2023-11-14T22:13:25Z")),
        },
    }
]

CLAUDE: list[dict[str, Any]] = [
    {
        "uuid": "c-1",
        "name": "Tides",
        "created_at": "2025-01-01T10:00:00Z",
        "updated_at": "2025-01-01T10:05:00Z",
        "is_starred": True,
        "model": "claude-x",
        "chat_messages": [
            {
                "uuid": "m1",
                "sender": "human",
                "text": "",
                "content": [{"type": "text", "text": "Why two tides?"}],
                "created_at": "2025-01-01T10:00:01Z",
                "attachments": [{"file_name": "", "extracted_content": "a table"}],
                "files": [{"file_name": "moon.jpg"}],
                "parent_message_uuid": ROOT,
            },
            {
                "uuid": "m2",
                "sender": "assistant",
                "text": "This block is not supported on your current device yet.",
                "content": [
                    {"type": "thinking", "thinking": "Gravity gradient."},
                    {"type": "tool_use", "name": "web_search", "input": {"query": "tides"}},
                    {"type": "tool_result", "name": "web_search", "content": [{"type": "text", "text": "A page"}]},
                    {
                        "type": "text",
                        "text": "Both sides are stretched.",
                        "citations": [{"title": "Tides", "url": "https://example.invalid/tides", "end_index": 24}],
                    },
                ],
                "created_at": "2025-01-01T10:00:05Z",
                "parent_message_uuid": "m1",
            },
            {
                "uuid": "m3",
                "sender": "assistant",
                "content": [{"type": "voice_note", "title": "Note", "text": "Spoken answer"}],
                "created_at": "2025-01-01T10:00:04Z",
                "parent_message_uuid": "m1",
            },
        ],
    }
]

OPEN_WEBUI: list[dict[str, Any]] = [
    {
        "id": "w-1",
        "title": "Sums",
        "created_at": 1_700_000_000,
        "updated_at": 1_700_000_010,
        "pinned": True,
        "archived": False,
        "chat": {
            "models": ["llama"],
            "history": {
                "currentId": "b",
                "messages": {
                    "a": {"id": "a", "parentId": None, "role": "user", "content": "2+2?", "timestamp": 1_700_000_000},
                    "b": {
                        "id": "b",
                        "parentId": "a",
                        "role": "assistant",
                        "model": "llama",
                        "timestamp": 1_700_000_001,
                        "content": '<details type="reasoning" done="true">\n<summary>Thought</summary>\n'
                        "&gt; Add them.\n</details>\n"
                        '<details type="tool_calls" name="add" arguments="{&quot;a&quot;: 2}" result="4">'
                        "\n<summary>Called</summary>\n</details>\n4",
                    },
                    "c": {
                        "id": "c",
                        "parentId": "a",
                        "role": "assistant",
                        "content": "",
                        "output": [
                            {"type": "reasoning", "content": [{"type": "output_text", "text": "Hm."}]},
                            {"type": "message", "content": [{"type": "output_text", "text": "Four"}]},
                        ],
                        "timestamp": 1_700_000_002,
                        "done": False,
                    },
                },
            },
        },
    }
]

LIBRECHAT: dict[str, Any] = {
    "conversationId": "l-1",
    "title": "Hello",
    "options": {"model": "gpt-z"},
    "messagesTree": [
        {
            "messageId": "m1",
            "parentMessageId": "00000000-0000-0000-0000-000000000000",
            "isCreatedByUser": True,
            "text": "Hi",
            "files": [{"filename": "a.txt", "type": "text/plain"}],
            "createdAt": "2024-04-09T14:32:05.230Z",
            "children": [
                {
                    "messageId": "m2",
                    "parentMessageId": "m1",
                    "isCreatedByUser": False,
                    "content": [
                        {"type": "think", "think": "A greeting."},
                        {"type": "text", "text": {"value": "Hello \ue202turn0search0"}},
                        {"type": "tool_call", "tool_call": {"name": "clock", "args": "{}", "output": "noon"}},
                    ],
                    "model": "gpt-z",
                    "createdAt": "2024-04-09T14:32:06Z",
                    "children": [],
                },
                {
                    "messageId": "m3",
                    "parentMessageId": "m1",
                    "isCreatedByUser": False,
                    "text": ":::thinking\nHm.\n:::\nHey",
                    "unfinished": True,
                    "createdAt": "2024-04-09T14:32:07Z",
                },
            ],
        }
    ],
}

GEMINI: list[dict[str, Any]] = [
    {
        "header": "Gemini Apps",
        "products": ["Gemini Apps"],
        "title": "Prompted And a duck egg?",
        "time": "2025-06-01T10:01:00Z",
        "details": [{"url": "https://gemini.google.com/app/abc123"}],
        "safeHtmlItem": [{"html": "<ul><li>Nine <b>minutes</b></li></ul>"}],
    },
    {
        "header": "Gemini Apps",
        "products": ["Gemini Apps"],
        "title": "Prompted Which tea?",
        "time": "2025-06-01T10:00:30Z",
        "attachedFiles": ["pot.png"],
        "safeHtmlItem": [{"html": '<p>Green &amp; <a href="https://example.invalid/tea">white</a></p>'}],
    },
    {
        "header": "Gemini Apps",
        "products": ["Gemini Apps"],
        "title": "Gave feedback: Good response",
        "time": "2025-06-01T10:00:20Z",
    },
    {
        "header": "Gemini Apps",
        "products": ["Gemini Apps"],
        "title": "Prompted How do I boil an egg?",
        "time": "2025-06-01T10:00:00Z",
        "details": [{"url": "https://gemini.google.com/app/abc123"}],
        "safeHtmlItem": [{"html": "<p>Seven minutes.</p><p>In water.</p>"}],
    },
]

AI_STUDIO: dict[str, Any] = {
    "runSettings": {"model": "models/gemini-x"},
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "chunkedPrompt": {
        "chunks": [
            {"role": "user", "text": "Egg?"},
            {"role": "model", "text": "Hm.", "isThought": True},
            {"role": "model", "text": "Seven."},
        ]
    },
}

GROK: dict[str, Any] = {
    "projects": [{"a": 1}],
    "conversations": [
        {
            "conversation": {
                "id": "x-1",
                "title": "Rain",
                "create_time": "2025-06-01T10:00:00.123Z",
                "modify_time": "2025-06-01T10:05:00Z",
                "starred": True,
            },
            "responses": [
                {
                    "response": {
                        "_id": "r1",
                        "sender": "human",
                        "message": "Rain?",
                        "create_time": {"$date": {"$numberLong": "1748772000000"}},
                    }
                },
                {
                    "response": {
                        "_id": "r2",
                        "sender": "ASSISTANT",
                        "message": 'Yes<grok:render type="x"><argument name="citation_id">0</argument></grok:render>.',
                        "thinking_trace": "Clouds.",
                        "web_search_results": [{"title": "Sky", "url": "https://example.invalid/sky"}],
                        "model": "grok-x",
                        "create_time": "2025-06-01T10:00:05Z",
                        "parent_response_id": "r1",
                    }
                },
            ],
        }
    ],
}

DEEPSEEK: list[dict[str, Any]] = [
    {
        "id": "d-1",
        "title": "Stocks",
        "inserted_at": "2026-01-01T10:00:00+08:00",
        "updated_at": "2026-01-01T10:05:00+08:00",
        "mapping": {
            "root": _node("root", None, None),
            "1": _node(
                "1",
                "root",
                {
                    "inserted_at": "2026-01-01T10:01:00+08:00",
                    "files": [{"file_name": "a.csv"}],
                    "fragments": [{"type": "REQUEST", "content": "Why?"}],
                },
            ),
            "2": _node(
                "2",
                "1",
                {
                    "model": "deepseek-x",
                    "inserted_at": "2026-01-01T10:01:05+08:00",
                    "fragments": [
                        {"type": "SEARCH", "results": [{"title": "News", "url": "https://example.invalid/n"}]},
                        {"type": "THINK", "content": "Hm."},
                        {"type": "RESPONSE", "content": "Fear[citation:1]."},
                    ],
                },
            ),
        },
    }
]

MESSAGES: list[dict[str, Any]] = [
    {
        "conversation_id": "z-1",
        "model": "gpt-x",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Time?"}, {"type": "image_url", "image_url": {}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "t", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
            },
            {"role": "tool", "tool_call_id": "t", "content": "noon"},
            {"role": "assistant", "content": "Noon."},
        ],
    }
]

UI_MESSAGES: list[dict[str, Any]] = [
    {"id": "msg-aaaaaaaa", "role": "user", "parts": [{"type": "text", "text": "Egg?"}]},
    {
        "id": "msg-bbbbbbbb",
        "role": "assistant",
        "parts": [
            {"type": "step-start"},
            {"type": "reasoning", "text": "Hm"},
            {"type": "tool-timer", "toolCallId": "t", "input": {"minutes": 7}, "output": "set"},
            {"type": "text", "text": "Seven."},
            {"type": "source-url", "url": "https://example.invalid/egg", "title": "Eggs"},
            {"type": "file", "mediaType": "image/png", "filename": "egg.png", "url": "data:image/png;base64,AA"},
        ],
    },
]

SAMPLES: dict[str, tuple[str, Any]] = {
    "chatgpt": ("chatgpt", CHATGPT),
    "claude": ("claude", CLAUDE),
    "open-webui": ("open-webui", OPEN_WEBUI),
    "librechat": ("librechat", LIBRECHAT),
    "gemini": ("gemini", GEMINI),
    "ai-studio": ("gemini", AI_STUDIO),
    "grok": ("grok", GROK),
    "deepseek": ("deepseek", DEEPSEEK),
    "messages": ("messages", MESSAGES),
    "ui-messages": ("messages", UI_MESSAGES),
}
"""By name, the format and the file's value."""
