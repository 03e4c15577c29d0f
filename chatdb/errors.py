"""
The errors that chatdb raises.

    ChatDBError
      NotFoundError               ConversationNotFoundError, MessageNotFoundError
      ConflictError               a key used with another body
      InvalidInputError           also a ValueError; .parameter names the argument
      UnavailableError            may be retried; .sent is False, True, or None for unknown
        AcquireTimeoutError       no connection became free in time
        CommandTimeoutError       the server did not answer in time
        PoolClosedError           the pool is closed, or not open yet
      SchemaError                 migrations are missing: run yoyo apply
      ConfigurationError          DSN, TLS, pooler, privileges, row-level security without a user, a pool in another
                                  process or event loop

No message holds a text of a conversation, a password or a key. The driver's own error, which may, is `__cause__`.
Misuse, such as two operations at once on one connection, stays the driver's own error: it is a bug to be seen.
All errors can be pickled and copied, so they reach the parent of a worker process; `__cause__` stays behind.
"""

from typing import Any, ClassVar


class ChatDBError(Exception):
    """
    The base of all errors that chatdb raises.

    The message is for the service's log. `public` is a sentence that may be shown to the service's own users.
    """

    public: ClassVar[str] = "Something went wrong on our side. Please try again later."

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with `args`, which is the message alone
        return _restore, (type(self), self.args), vars(self)


def _restore(error_class: type[ChatDBError], args: tuple[object, ...]) -> ChatDBError:
    return error_class.__new__(error_class, *args)


class NotFoundError(ChatDBError):
    """The user has no such thing. Another user may have it: the two cases look the same."""

    public = "This does not exist."


class ConversationNotFoundError(NotFoundError):
    """The user has no such conversation, whoever else may have it."""

    public = "This conversation does not exist."


class MessageNotFoundError(NotFoundError):
    """The user's conversation has no such message."""

    public = "This message does not exist."


class ConflictError(ChatDBError):
    """A key that is already used came again with another body. Nothing was written."""

    public = "This was saved before with other contents. Please reload."


class InvalidInputError(ChatDBError, ValueError):
    """
    An argument that chatdb does not take. Nothing was written.

    `parameter` is the name of the argument, like `"content"` or `"messages[3].role"`.
    """

    public = "This input cannot be saved."
    parameter: str

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter


class UnavailableError(ChatDBError):
    """
    The database could not be reached, or went away, or rolled the statement back for a reason that passes.

    `sent` says what is known of the statement: `False`, it was not sent; `True`, it was; `None`, it may have been.
    A read and a keyed write can be repeated in every case, a write without a key only if `sent` is `False`.
    """

    public = "The service is busy at the moment. Please try again."
    sent: bool | None

    def __init__(self, message: str, *, sent: bool | None) -> None:
        super().__init__(message)
        self.sent = sent


class AcquireTimeoutError(UnavailableError):
    """No connection became free, or could be made, within the pool's acquire timeout. Nothing was sent."""


class CommandTimeoutError(UnavailableError):
    """The server did not answer within the command timeout. The statement was sent and may have been carried out."""


class PoolClosedError(UnavailableError):
    """The pool is closed, is closing, or was not opened yet. Nothing was sent."""


class SchemaError(ChatDBError):
    """The database lacks chatdb's tables, or has them older than this release needs: run `yoyo apply`."""

    public = "The service is not available at the moment. Please try again later."


class ConfigurationError(ChatDBError):
    """
    The DSN, its TLS settings, a pooler or the role's privileges do not fit; the message says what to change.

    It is also raised where a pool is used outside the process or the event loop that opened it, and where
    the database's own triggers, constraints or sequences refuse a statement that is right by chatdb's rules.
    """

    public = "The service is not available at the moment. Please try again later."
