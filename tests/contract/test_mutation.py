"""The mutation generator: it makes each kind, as valid Python, and changes only code that runs."""

from __future__ import annotations

import ast

import pytest

from tests.support.mutation import TESTS, core, mutations, sample
from tests.support.paths import ROOT

pytestmark = pytest.mark.server_independent

SOURCE = '''
def f(a: int = 1 + 1, *, b: list[Literal[1]] = ()) -> Literal[2]:
    """Return 1 + 1."""
    if a and not b:
        raise ValueError("a")
    for each in b:
        if each < 3:
            continue
        a += each
    assert a == 1
    await g(a, b=b)
    return a if a == 2 else None
'''


def test_every_kind_is_made():
    """Each mutation changes one condition, comparison, constant, statement or keyword argument."""
    found = {(mutation.before, mutation.after) for mutation in mutations("f.py", SOURCE)}
    assert found == {
        ("1 + 1", "1 - 1"),
        ("1", "2"),
        ("a and not b", "(not (a and not b))"),
        ("a and not b", "(a or (not b))"),
        ("not b", "b"),
        ('raise ValueError("a")', "pass"),
        ("each < 3", "(not (each < 3))"),
        ("each < 3", "each <= 3"),
        ("3", "4"),
        ("continue", "break"),
        ("a += each", "pass"),
        ("await g(a, b=b)", "pass"),
        ("g(a, b=b)", "g(a)"),
        ("return a if a == 2 else None", "return None"),
        ("a == 2", "a != 2"),
        ("2", "3"),
    }


def test_a_mutation_of_the_core_is_another_program():
    """Each mutation in a sample is valid Python that differs from the module."""
    for change in sample(core(), 40, seed=1):
        source = (ROOT / change.path).read_bytes()
        assert ast.dump(ast.parse(change.of(source))) != ast.dump(ast.parse(source)), change


def test_a_sample_can_be_repeated():
    """The same seed gives the same sample, with every module in it."""
    found = core()
    chosen = sample(found, 2 * len(found), seed=1)
    assert chosen == sample(found, 2 * len(found), seed=1)
    assert chosen != sample(found, 2 * len(found), seed=2)
    assert {mutation.path for mutation in chosen} == found.keys()


def test_the_tests_of_each_module_are_there():
    """The table names each core module and existing test files."""
    assert TESTS.keys() == core().keys()
    assert [test for tests in TESTS.values() for test in tests if not (ROOT / test).exists()] == []
