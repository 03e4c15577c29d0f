"""Whether a database has what this release needs."""

from __future__ import annotations

from chatdb._query import Database, Query
from chatdb.errors import SchemaError
from chatdb.records import SchemaPart

_check_schema = Query("check_schema", SchemaPart, repeatable=True)

NEEDED = {
    "conversations": {
        "id": "bigint",
        "user_id": "text",
        "key": "text",
        "title": "text",
        "metadata": "jsonb",
        "last_seq": "bigint",
        "created_at": "timestamp with time zone",
        "updated_at": "timestamp with time zone",
        "active_on": "date",
        "pk_conversations": "index",
        "uq_conversations_user_id_key": "index",
        "ix_conversations_user_id_active_on": "index",
    },
    "messages": {
        "id": "bigint",
        "conversation_id": "bigint",
        "user_id": "text",
        "seq": "bigint",
        "role": "text",
        "content": "text",
        "payload": "json",
        "metadata": "jsonb",
        "token_count": "integer",
        "key": "text",
        "created_at": "timestamp with time zone",
        "pk_messages": "index",
        "uq_messages_user_id_conversation_id_key": "index",
    },
}
"""The tables of the schema `chatdb`, each with the types of its columns and with its indexes."""


async def check_schema(db: Database) -> None:
    """
    Return if this release can work on the database; more columns and indexes than it needs are welcome.

    Raises SchemaError, which names what is missing or of another type.
    """
    found = {(part.relation, part.name): part.type for part in await _check_schema.fetch_all(db)}
    if not found:
        raise SchemaError("the database has no chatdb tables: run yoyo apply, or chatdb migrate")
    missing = [
        f"{table}.{name} ({kind})"
        for table, parts in NEEDED.items()
        for name, kind in parts.items()
        if found.get((table, name)) != kind
    ]
    if missing:
        raise SchemaError(f"the database's chatdb tables lack {', '.join(missing)}: run yoyo apply, or chatdb migrate")
