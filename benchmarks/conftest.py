"""The benchmarks run on the same servers as the tests."""

from tests.conftest import pytest_addoption, pytest_report_header, server, template

__all__ = ["pytest_addoption", "pytest_report_header", "server", "template"]
