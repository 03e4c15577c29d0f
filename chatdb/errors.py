"""
Errors that chatdb raises.

    ChatDBError
      NotFoundError               ConversationNotFoundError, MessageNotFoundError
      ConflictError               a key is stored with a different body
        StaleError                another caller wrote to the conversation first
      InvalidInputError           also a ValueError; .parameter names the argument
      UnavailableError            may be retried; .sent is False, True, or None for unknown
        AcquireTimeoutError       no connection became free in time
        CommandTimeoutError       the server did not answer in time
        PoolClosedError           the pool is closed, or not open yet
      SchemaError                 migrations are missing: run chatdb migrate or yoyo apply
      ConfigurationError          DSN, TLS, pooler, privileges, row-level security without a user, a pool used in
                                  another process or event loop

No error text quotes a conversation, a password or a key. `__cause__` is the driver's own error, which may quote them.
Programming errors, such as two concurrent operations on one connection, propagate as the driver raises them.
All errors can be pickled and copied, so they cross process boundaries; `__cause__` does not.
"""

from typing import Any, ClassVar


class ChatDBError(Exception):
    """
    Base class of all errors that chatdb raises.

    The error text is for the service's log. `public` is a sentence that the service can show to its users.
    """

    public: ClassVar[str] = "Something went wrong on our side. Please try again later."

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's version calls the class with `args`, which lacks the keyword arguments.
        return _restore, (type(self), self.args), vars(self)


def _restore(error_class: type[ChatDBError], args: tuple[object, ...]) -> ChatDBError:
    return error_class.__new__(error_class, *args)


class NotFoundError(ChatDBError):
    """The user has no such conversation or message. Another user's data is reported the same way."""

    public = "This does not exist."


class ConversationNotFoundError(NotFoundError):
    """The user has no such conversation, even if another user has."""

    public = "This conversation does not exist."


class MessageNotFoundError(NotFoundError):
    """The user's conversation has no such message."""

    public = "This message does not exist."


class ConflictError(ChatDBError):
    """The key is already stored with a different body. Nothing was written."""

    public = "This was already saved with different content. Please reload."


class StaleError(ConflictError):
    """Another caller has written to the conversation since `expected` was read. Nothing was written."""

    public = "This was changed in the meantime. Please reload."


class InvalidInputError(ChatDBError, ValueError):
    """
    An argument is invalid. Nothing was written.

    `parameter` names the argument, such as `"content"` or `"messages[3].role"`.
    """

    public = "This input cannot be saved."
    parameter: str

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter


class UnavailableError(ChatDBError):
    """
    The database could not be reached, the connection was lost, or a transient conflict rolled the statement back.

    `sent` tells whether the statement was sent: `False` for no, `True` for yes, `None` for unknown. Reads and keyed
    writes can always be repeated; repeat a write without a key only if `sent` is `False`.
    """

    public = "The service is busy at the moment. Please try again."
    sent: bool | None

    def __init__(self, message: str, *, sent: bool | None) -> None:
        super().__init__(message)
        self.sent = sent


class AcquireTimeoutError(UnavailableError):
    """The pool had no free connection, or could not open one, within the acquire timeout. Nothing was sent."""


class CommandTimeoutError(UnavailableError):
    """The server did not answer within the command timeout. It may have run unless `sent` is False."""


class PoolClosedError(UnavailableError):
    """The pool is closed, is closing, or is not open yet. Nothing was sent."""


class SchemaError(ChatDBError):
    """chatdb's tables are missing or older than this release needs: run `chatdb migrate` or `yoyo apply`."""

    public = "The service is not available at the moment. Please try again later."


class ConfigurationError(ChatDBError):
    """
    The DSN, TLS settings, pooler or the role's privileges are wrong; the error text says what to change.

    Also raised if a pool is used outside the process or event loop that opened it, or if a trigger, constraint or
    sequence of the host database rejects a statement that is valid for chatdb.
    """

    public = "The service is not available at the moment. Please try again later."
