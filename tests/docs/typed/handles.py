"""asyncpg's own handles, and the values of rows; `nox -s typed` checks it where chatdb is installed alone."""
# mypy: disallow-any-expr=False

import asyncpg  # type: ignore[import-untyped] # pyright: ignore[reportMissingTypeStubs]

import chatdb


async def serve(pool: asyncpg.Pool, connection: asyncpg.Connection) -> None:
    """Use an asyncpg pool and an asyncpg connection."""
    await chatdb.create_conversation(pool, user_id="alice")
    await chatdb.create_conversation(connection, user_id="alice")
    async for message in chatdb.iter_messages(pool, user_id="alice", conversation_id=1):
        print(message.content)
    async with chatdb.transaction(pool) as inside:
        await chatdb.create_conversation(inside, user_id="alice")
    async with chatdb.transaction(connection) as inside:
        await chatdb.create_conversation(inside, user_id="alice")


async def rows(db: chatdb.Pool) -> int:
    """Read the values in a row, which have no type."""
    row = await db.fetchrow("select 1 as one")
    number: int = 0 if row is None else row["one"]
    other: int = await db.fetchval("select 1")
    return number + other
