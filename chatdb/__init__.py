"""An asynchronous data layer for chatbot conversations and messages on PostgreSQL."""

import sys
from itertools import pairwise
from typing import TYPE_CHECKING

# For `python -m chatdb` only: handle an interrupt from here on instead of after the imports below.
if sys.argv[:1] == ["-m"] and ("-m", "chatdb") in pairwise(sys.orig_argv):
    import _chatdb_entry  # noqa: F401  # pyright: ignore[reportUnusedImport]

from chatdb._core.query import Database
from chatdb.branches import delete_branch, fork_conversation, get_branch, get_context, list_versions, switch_branch
from chatdb.conversations import (
    create_conversation,
    delete_conversation,
    get_conversation,
    list_conversations,
    list_pinned,
    list_previews,
    load_conversation,
    update_conversation,
    upsert_conversation,
)
from chatdb.errors import (
    AcquireTimeoutError,
    ChatDBError,
    CommandTimeoutError,
    ConfigurationError,
    ConflictError,
    ConversationNotFoundError,
    InvalidInputError,
    MessageNotFoundError,
    NotFoundError,
    PoolClosedError,
    SchemaError,
    StaleError,
    UnavailableError,
)
from chatdb.messages import (
    append_message,
    append_messages,
    delete_message,
    delete_messages_after,
    get_history,
    get_message,
    iter_messages,
    list_messages,
    pop_message,
    replace_messages_after,
    update_message,
    upsert_message,
)
from chatdb.pool import Connection, Pool, create_pool, transaction
from chatdb.records import (
    NEW,
    UNSET,
    Call,
    Conversation,
    Deleted,
    JsonText,
    Match,
    Message,
    MessageTail,
    Moved,
    NewMessage,
    Role,
    Unset,
)
from chatdb.replicas import Reader, ReplicaState
from chatdb.schema import check_schema
from chatdb.search import search_messages
from chatdb.streaming import (
    MessageStream,
    extend_message,
    finish_message,
    list_streaming,
    read_message,
    start_message,
    stream_message,
)
from chatdb.users import delete_user, export_user, move_user
from chatdb.watching import Watcher

if TYPE_CHECKING:
    from chatdb.admin.service import migrate
    from chatdb.embedded import open_embedded

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """Import on first use what few programs need: the embedded server, the migrations and the version."""
        if name == "open_embedded":
            from chatdb.embedded import open_embedded as found
        elif name == "migrate":
            from chatdb.admin.service import migrate as found
        elif name == "__version__":
            from importlib.metadata import version

            found = version("chatdb")
        else:
            raise AttributeError(f"module 'chatdb' has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "NEW", "UNSET", "AcquireTimeoutError", "Call", "ChatDBError", "CommandTimeoutError", "ConfigurationError",
    "ConflictError", "Connection", "Conversation", "ConversationNotFoundError", "Database", "Deleted",
    "InvalidInputError", "JsonText", "Match", "Message", "MessageNotFoundError", "MessageStream", "MessageTail",
    "Moved", "NewMessage", "NotFoundError", "Pool", "PoolClosedError", "Reader", "ReplicaState", "Role", "SchemaError",
    "StaleError", "UnavailableError", "Unset", "Watcher", "append_message", "append_messages", "check_schema",
    "create_conversation", "create_pool", "delete_branch", "delete_conversation", "delete_message",
    "delete_messages_after", "delete_user", "export_user", "extend_message", "finish_message", "fork_conversation",
    "get_branch", "get_context", "get_conversation", "get_history", "get_message", "iter_messages",
    "list_conversations", "list_messages", "list_pinned", "list_previews", "list_streaming", "list_versions",
    "load_conversation", "migrate", "move_user", "open_embedded", "pop_message", "read_message",
    "replace_messages_after", "search_messages", "start_message", "stream_message", "switch_branch", "transaction",
    "update_conversation", "update_message", "upsert_conversation", "upsert_message",
]  # fmt: skip
