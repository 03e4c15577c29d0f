"""An older system beside chatdb: its Alembic migration, SQLModel entities and a service that writes with them."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, select

from benchmarks import original
from benchmarks.original import Conversation, Message

START = datetime(2026, 3, 1, 12)  # noqa: DTZ001 - the older system's times have no zone

ENV = """
from alembic import context
from sqlalchemy import NullPool, create_engine

engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""

REVISION = '''
"""Users, tasks and conversations."""

import sqlalchemy as sa
import sqlmodel
from alembic import op

revision = "3f0c1d2e4b5a"
down_revision = None


def upgrade():
    text = sqlmodel.sql.sqltypes.AutoString
    op.create_table(
        "users",
        sa.Column("id", text(), nullable=False),
        sa.Column("email", text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_users_email"), "users", ["email"], unique=True)
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", text(), nullable=False),
        sa.Column("title", text(), nullable=False),
        sa.Column("priority", sa.Enum("LOW", "HIGH", name="task_priority"), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_conversations_user_id"), "conversations", ["user_id"], unique=False)
    op.create_table(
        "messages",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("conversation_id", sa.Integer(), nullable=False),
        sa.Column("user_id", text(), nullable=False),
        sa.Column("role", text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_messages_conversation_id"), "messages", ["conversation_id"], unique=False)
    op.create_index(op.f("ix_messages_user_id"), "messages", ["user_id"], unique=False)
    op.execute("insert into users values ('u0', 'u0@example.org'), ('u1', 'u1@example.org')")
    op.execute("insert into tasks (user_id, title, priority) values ('u0', 'water the plants', 'HIGH')")
'''


def migrate(dsn: str, folder: Path) -> None:
    """Write the older system's Alembic migration into a folder, and run it."""
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(ENV)
    (folder / "versions" / "3f0c1d2e4b5a_tables.py").write_text(REVISION)
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", _url(dsn).replace("%", "%%"))
    command.upgrade(config, "head")


def _url(dsn: str) -> str:
    return dsn.replace("postgresql://", "postgresql+psycopg://", 1)


def session(dsn: str) -> Session:
    """Return a session for the older system's entities."""
    return Session(create_engine(_url(dsn), poolclass=NullPool))


def fill(dsn: str, conversations: int = 12, messages: int = 9) -> None:
    """Store conversations of three users with interleaved messages. Some have equal times or are out of order."""
    dice = random.Random(20260301)
    with session(dsn) as older:
        made = [
            Conversation(user_id=f"u{n % 3}", created_at=START + timedelta(hours=n), updated_at=START)
            for n in range(conversations)
        ]
        older.add_all(made)
        older.flush()
        for n in range(messages):
            for each in made:
                moment = each.created_at + timedelta(minutes=dice.choice([n, n, n - 2]), microseconds=123456)
                each.updated_at = max(each.updated_at, moment)
                older.add(
                    Message(
                        conversation_id=each.id,
                        user_id=each.user_id,
                        role=dice.choice(["user", "assistant", "system", "developer", "tool"]),
                        content=dice.choice(["", "hello 👋", "line\nline\ttab", "é" * 3000, f"text {n} of {each.id}"]),
                        created_at=moment,
                    )
                )
        older.commit()


def add(dsn: str, *rows: Conversation | Message) -> list[int]:
    """Store rows with the older system, and return their ids."""
    with session(dsn) as older:
        for row in rows:
            older.add(row)
            older.flush()
        ids = [int(row.id or 0) for row in rows]
        older.commit()
    return ids


def rows(dsn: str) -> tuple[list[Conversation], list[Message]]:
    """Return all conversations and all messages in the older system's order."""
    with session(dsn) as older:
        messages = select(Message).order_by(Message.created_at, Message.id)  # type: ignore[arg-type]
        return list(older.exec(select(Conversation).order_by(Conversation.id))), list(older.exec(messages))  # type: ignore[arg-type]


def untouched(dsn: str) -> list[tuple[object, ...]]:
    """Return a fingerprint of `public`: the physical rows, columns, constraints and indexes of each table."""
    with psycopg.connect(dsn) as connection:
        found = connection.execute(
            "select c.oid, c.relname, c.relfilenode, c.relacl::text, c.relhastriggers, md5(pg_get_indexdef(c.oid)), "
            "(select string_agg(a::text, ' ' order by attnum) from pg_attribute as a where attrelid = c.oid), "
            "(select string_agg(pg_get_constraintdef(k.oid), ' ' order by k.oid) from pg_constraint as k "
            "where k.conrelid = c.oid) from pg_class as c where c.relnamespace = 'public'::regnamespace "
            "and c.relname not like '%yoyo%' and c.relname not like '%chatdb%' order by c.relname"
        ).fetchall()
        names = connection.execute(
            "select tablename from pg_tables where schemaname = 'public' and tablename not like '%yoyo%' order by 1"
        ).fetchall()
        for (name,) in names:
            found += connection.execute(
                f"select '{name}', count(*), md5(string_agg(concat(xmin, xmax, ctid, t), '|' order by ctid)) "
                f"from public.{name} as t"
            ).fetchall()
        found += connection.execute("select enumlabel::text, enumtypid from pg_enum order by enumsortorder").fetchall()
    return found


class Writers:
    """The older system's service, which writes in a thread until it is stopped or refused."""

    def __init__(self, dsn: str, tasks: int = 4) -> None:
        """Prepare the service. `with` starts it."""
        self.acknowledged: set[int] = set()
        """The ids of messages whose commit was acknowledged."""
        self.refused: list[Exception] = []
        self._dsn = dsn
        self._tasks = tasks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    def __enter__(self) -> Writers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Finish the writes in progress, and stop."""
        self._stop.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        """Wait until this many more messages are stored."""
        goal = len(self.acknowledged) + more
        while len(self.acknowledged) < goal and self._thread.is_alive():
            self._stop.wait(0.005)

    async def _work(self) -> None:
        engine = original.engine(self._dsn, self._tasks)
        try:
            await asyncio.gather(*(self._serve(original.sessions(engine), n) for n in range(self._tasks)))
        finally:
            await engine.dispose()

    async def _serve(self, sessions, number: int) -> None:
        dice = random.Random(number)
        user = f"u{number}"
        mine: list[int] = []
        with suppress(_Refused):
            while not self._stop.is_set():
                async with sessions() as older:
                    try:
                        if not mine or dice.random() < 0.2:
                            mine.append(int((await original.create_conversation(older, user)).id or 0))
                        added = await self._add(older, dice, user, dice.choice(mine))
                        self.acknowledged.add(int(added.id or 0))
                    except DBAPIError as error:
                        self.refused.append(error)
                        raise _Refused from None

    async def _add(self, older, dice: random.Random, user: str, conversation: int) -> Message:
        if dice.random() < 0.7:
            return await original.add_message(older, user, conversation, "user", f"of {user}")
        # a slow request: its time and id are older than those of messages committed earlier
        message = Message(conversation_id=conversation, user_id=user, role="assistant", content="slowly")
        older.add(message)
        await older.flush()
        await asyncio.sleep(dice.random() * 0.05)
        await older.commit()
        await older.refresh(message)
        return message


class _Refused(Exception):  # noqa: N818 - control flow, not an error
    """The database refuses the service's writes."""
