"""The classes of asyncpg that chatdb's handles are; `handles.pyi` types them without asyncpg-stubs."""

from __future__ import annotations

import asyncpg
from asyncpg.cursor import Cursor, CursorFactory
from asyncpg.pool import PoolAcquireContext as AcquireContext
from asyncpg.transaction import Transaction

AsyncpgPool, Connection, Record = asyncpg.Pool, asyncpg.Connection, asyncpg.Record

__all__ = ["AcquireContext", "AsyncpgPool", "Connection", "Cursor", "CursorFactory", "Record", "Transaction"]
