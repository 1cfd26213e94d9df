"""What the tests of lora share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lora.cluster import Cluster
from tests.lora.shelf import Shelf


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes over one network, with an event loop of their own."""
    made = Cluster(tmp_path)
    yield made
    made.loop.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Callable[[int], Shelf]:
    """Makes a store with room for so many adapters of rank 4."""
    return lambda adapters_that_fit: Shelf(tmp_path, adapters_that_fit)
