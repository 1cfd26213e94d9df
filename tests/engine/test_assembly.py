"""An assembled engine has what its device needs, and no more."""

import subprocess
import sys

STEPS = """
import sys
from engine import LLM, SamplingParams
llm = LLM(device="cpu", max_model_len=64, kv_cache_bytes=1 << 20)
(result,) = llm.generate(["garden"], SamplingParams(temperature=0, max_tokens=2), "reverse")
llm.close()
print(len(result.outputs[0].token_ids), *(name for name in sys.modules if name.partition(".")[0] == "triton"))
"""


def test_an_engine_on_a_cpu_steps_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
