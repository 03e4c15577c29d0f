"""Test modules do not import each other."""

from __future__ import annotations

import ast

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent

FILES = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def shared_wrongly(source: str) -> list[str]:
    """Return the test and conftest modules that a source imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [(name, name.split(".")) for name in names]
        found += [name for name, words in parts if any(word == "conftest" or word[:5] == "test_" for word in words)]
    return found


def test_no_test_imports_another():
    """No module imports a test module or a conftest; shared code is in tests/support."""
    found = {str(path.relative_to(ROOT)): shared_wrongly(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from tests.api.{} import CALLS",
        "from tests import {}",
        "import tests.pool.{}",
        "from .{} import CALLS",
        "def f():\n    from tests.admin import {}",
    ],
)
@pytest.mark.parametrize("module", ["conftest", "test_pool"])
def test_an_import_of_a_test_is_found(source, module):
    """Every form of such an import is found."""
    assert len(shared_wrongly(source.format(module))) == 1
