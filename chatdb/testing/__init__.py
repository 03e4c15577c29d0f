"""
A pytest plugin with migrated databases, pools, transactions and conversations for the tests of a service.

It loads only on demand: with `pytest_plugins = ["chatdb.testing"]` in the conftest.py of the root folder, or with
`-p chatdb.testing`. Requires the extra `testing`. docs/howto/testing.md describes the fixtures.
"""

from chatdb.testing.databases import Databases
from chatdb.testing.factories import ConversationFactory

__all__ = ["ConversationFactory", "Databases"]

pytest_plugins = ["chatdb.testing.plugin"]
