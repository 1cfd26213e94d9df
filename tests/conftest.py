"""What all tests share: one thread of arithmetic, chance that repeats, and bounded loops for coroutines.

`HYPOTHESIS_PROFILE=search` looks for new counterexamples, with thirty times the examples and chance of its own. A
property that sets its number of examples asks `tests.chance` for it.
"""

import asyncio
import inspect
import os

import pytest
import torch
from hypothesis import settings

from tests.chance import PROFILE, examples

_BOUND_S = 240  # of a coroutine test: a browser takes long, and only what hangs gets there

torch.set_num_threads(1)  # the models are small: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # nor do those of the processes that tests start
settings.register_profile("repeat", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=examples(100), print_blob=True)
settings.load_profile(PROFILE)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in a loop of its own, within a bound."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), _BOUND_S))
    return True
