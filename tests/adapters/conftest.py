"""Collects the tests of the adapters, which import every framework, only in nox -s frameworks."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the modules unless the session asked for them."""
    return True if collection_path.suffix == ".py" and not config.getoption("--frameworks") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test of this folder its mark."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("frameworks")
