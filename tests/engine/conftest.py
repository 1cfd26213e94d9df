"""What the engine's tests share."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine import LLM


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The embedded model with its adapters; tests leave no request behind."""
    options: Any = {"kv_cache_bytes": "8MiB"}
    with LLM(max_model_len=128, **options) as made:
        yield made
