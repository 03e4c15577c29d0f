"""Applies the files under `migrations/` by yoyo, as `yoyo apply` does: the same files, the same bookkeeping."""

from __future__ import annotations

from chatdb._query import data_folder
from chatdb.dsn import libpq_dsn
from chatdb.errors import ChatDBError, ConfigurationError, UnavailableError

MISSING = "yoyo is not installed: pip install 'chatdb[migrate]'"


def apply_migrations(dsn: str) -> list[str]:
    """
    Apply the migrations that the database lacks, and return their names.

    Blocks; in a coroutine call it by `asyncio.to_thread`. `dsn` is that of a direct connection, not of a pooler, by a
    role that may create things.

    Raises ConfigurationError, and UnavailableError when the server cannot be reached or another process is at it.
    """
    try:
        import psycopg
        import yoyo
        from yoyo.exceptions import LockTimeout
    except ImportError:
        raise ConfigurationError(MISSING) from None
    try:
        with psycopg.connect(libpq_dsn(dsn, scheme="postgresql")) as connection:
            # yoyo would take the lack of it for a lock, wait ten seconds, and then miss its tables
            row = connection.execute("select has_database_privilege(current_database(), 'create')").fetchone()
        if not row or not row[0]:
            raise _explained("42501")
        backend = yoyo.get_backend(libpq_dsn(dsn, scheme="postgresql+psycopg"))
        try:
            with backend.lock():
                missing = backend.to_apply(yoyo.read_migrations(str(data_folder("migrations"))))
                backend.apply_migrations(missing)
                return [migration.id for migration in missing]
        finally:
            backend.connection.close()
    except LockTimeout as error:
        raise UnavailableError(
            "another process migrates this database; if that process was killed, run yoyo break-lock and then again",
            sent=False,
        ) from error
    except psycopg.Error as error:
        raise _explained(error.sqlstate or "") from error


def _explained(state: str) -> ChatDBError:
    if state == "42501":
        return ConfigurationError("the database role may not create a schema: migrate as the database's owner")
    if state[:2] in {"28", "3D"}:
        return ConfigurationError("the server refused the user, the password or the database name: check the DSN")
    if state:
        return ChatDBError(f"a migration failed (SQLSTATE {state}); it can be run again once the cause is mended")
    return UnavailableError(  # libpq gives no SQLSTATE when it cannot connect
        "the database server cannot be reached, or refused the user, the password or the database name: check that it "
        "runs, and the DSN",
        sent=False,
    )
