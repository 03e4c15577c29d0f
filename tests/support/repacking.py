"""Messages that are written in turn, as many users write them."""

from __future__ import annotations

from tests.support.databases import execute


def fill(dsn: str, conversations: int, messages: int = 100) -> None:
    """Store conversations of the users `user 0` to `user 9`, of which each message is about 700 bytes long."""
    execute(
        dsn,
        "insert into chatdb.conversations (user_id, id, last_seq) "
        f"select 'user ' || n % 10, n, {messages} from generate_series(1, {conversations}) as n",
        "insert into chatdb.messages (user_id, conversation_id, seq, role, content, created_at) "
        "select c.user_id, c.id, n, 'user', "
        "(select string_agg(md5(c.id::text || n || w), ' ') from generate_series(1, 20) as w), now() "
        f"from generate_series(1, {messages}) as n cross join chatdb.conversations as c order by n, c.id",
        f"select setval('chatdb.conversations_id_seq', {conversations})",
        "vacuum (analyze) chatdb.messages, chatdb.conversations",
    )
