"""What the tests of lora share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lora.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes over one network, with an event loop of their own."""
    made = Cluster(tmp_path)
    yield made
    made.loop.close()
