"""What all tests share: one thread of arithmetic, and chance that repeats.

`HYPOTHESIS_PROFILE=search` looks for new counterexamples, with thirty times the examples and chance of its own. A
property that sets its number of examples asks `tests.chance` for it.
"""

import os

import torch
from hypothesis import settings

from tests.chance import PROFILE, examples

torch.set_num_threads(1)  # the models are small: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # nor do those of the processes that tests start
settings.register_profile("repeat", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=examples(100), print_blob=True)
settings.load_profile(PROFILE)
