"""Valid DSNs and files for the fuzzers to mutate."""

from __future__ import annotations

import json

from tests.support.samples import SAMPLES

SECRET = "s3cr3t-word"

DSNS = (
    f"postgresql://alice:{SECRET}@localhost:5432/chat?sslmode=prefer&channel_binding=require",
    f"postgres://alice:{SECRET}@[::1]:5432,127.0.0.2:5433/chat?target_session_attrs=read-write",
    f"postgresql+psycopg://alice@/chat?host=/var/run/postgresql&password={SECRET}&connect_timeout=5",
)
FILES = (
    json.dumps(
        [
            {"id": "a", "conversations": [{"from": "human", "value": "hi 👋"}, {"from": "gpt", "value": "ho"}]},
            {"id": "b", "items": [{"from": "user", "value": "\ud800"}]},
        ]
    ),
    json.dumps(
        [
            {
                "id": "c",
                "title": "t",
                "create_time": 1.5,
                "update_time": 2.5,
                "current_node": "n",
                "mapping": {
                    "r": {"id": "r", "message": None, "parent": None, "children": ["n", "m"]},
                    "n": {
                        "id": "n",
                        "parent": "r",
                        "children": [],
                        "message": {
                            "id": "n",
                            "author": {"role": "user"},
                            "create_time": 1.5,
                            "content": {"content_type": "text", "parts": ["hi"]},
                        },
                    },
                    "m": {
                        "id": "m",
                        "parent": "r",
                        "children": [],
                        "message": {
                            "id": "m",
                            "author": {"role": "assistant"},
                            "create_time": None,
                            "content": {"content_type": "code", "text": "ho"},
                        },
                    },
                },
            }
        ]
    ),
    '{"type": "chatdb", "version": 1}\n'
    '{"type": "conversation", "key": "k", "title": null, "metadata": null, "last_seq": 2, '
    '"head_seq": 1, "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}\n'
    '{"type": "message", "seq": 1, "role": "user", "content": "x", "payload": null, "metadata": null, '
    '"token_count": null, "key": null, "created_at": "2026-01-01T00:00:00Z"}\n'
    '{"type": "message", "seq": 2, "role": "user", "content": "y", "payload": null, "metadata": null, '
    '"token_count": null, "key": null, "created_at": "2026-01-01T00:00:00Z", "parent_seq": 0}\n'
    '{"type": "end", "conversations": 1, "messages": 2}\n',
    *(json.dumps(value) for _, value in SAMPLES.values()),
)
WORDS = {
    "dsn": ("%zz", "%00", "%ff", "#", "@", "[", "]", ",", "port=", "sslmode=verify-full", "connect_timeout="),
    "file": ("NaN", "Infinity", "1e999", "1e19", "-1", "null", "true", "{}", "[]", "[[[[[[[[", "\\ud800", "\\u0000"),
}
"""Words for the coverage-guided fuzzer, which rarely finds longer ones by itself."""
