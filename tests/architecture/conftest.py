"""The real tree, read once for all checks."""

import pytest

from tests.architecture import source
from tests.architecture.source import Source


@pytest.fixture(scope="session")
def library() -> tuple[Source, ...]:
    """Read the library's files."""
    return source.read(source.LIBRARY)


@pytest.fixture(scope="session")
def project(library: tuple[Source, ...]) -> tuple[Source, ...]:
    """Read the library's files and those of the scripts."""
    return library + source.read(["scripts"])
