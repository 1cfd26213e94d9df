"""How long a property is looked at: as its test asks, and thirty times as long in a search for new counterexamples
(`HYPOTHESIS_PROFILE=search`)."""

import os
import random

from hypothesis import strategies as st

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repeat")


def examples(count: int) -> int:
    """The examples to try where `count` are enough for every day."""
    return count * 30 if PROFILE == "search" else count


def chances() -> st.SearchStrategy[random.Random]:
    """Sources of chance for `scripts.fuzz.mutators`, each by its seed: hypothesis' own differ far less."""
    return st.builds(random.Random, st.integers(0, 2**64))
