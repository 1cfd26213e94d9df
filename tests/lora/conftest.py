"""What the tests of lora share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lora.cluster import Cluster
from tests.lora.store_rig import StoreRig


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Nodes over one network, with an event loop of their own."""
    made = Cluster(tmp_path)
    yield made
    made.loop.close()


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[[int], StoreRig]:
    """Makes a store with room for so many adapters of rank 4."""
    return lambda adapters_that_fit: StoreRig(tmp_path, adapters_that_fit)
