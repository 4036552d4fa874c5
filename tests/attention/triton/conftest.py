"""Fixtures of the files that run in Triton's interpreter."""

import pytest

from tests.quick_interpreter import quick_interpreter


@pytest.fixture(scope="session")
def quick():
    with quick_interpreter():
        yield
