"""Name the targets of the fuzzer, and open one: the one place where they are chosen."""

from collections.abc import Callable, Mapping

from scripts.fuzz.case import Target
from scripts.fuzz.harnesses.batch_input import BatchTarget
from scripts.fuzz.harnesses.bodies import BodiesTarget
from scripts.fuzz.harnesses.clusters import ClustersTarget
from scripts.fuzz.harnesses.folders import adapters, checkpoints, tokenizers
from scripts.fuzz.harnesses.readers import control_messages, requests

TARGETS: Mapping[str, tuple[Callable[[], Target], str]] = {
    "bodies": (BodiesTarget, "bodies of every JSON route, sent to a real server of the embedded model"),
    "batch-lines": (BatchTarget, "files of batch lines, answered and resumed"),
    "adapters": (adapters, "an adapter's adapter_config.json and safetensors file"),
    "checkpoints": (checkpoints, "a checkpoint's configuration, index and weights"),
    "tokenizers": (tokenizers, "a tokenizer's files and chat template"),
    "requests": (requests, "bodies and batch lines, decoded and checked without a server"),
    "messages": (control_messages, "what nodes send each other over the control connection"),
    "clusters": (
        ClustersTarget,
        "simulated clusters under faults, with every promise checked after every event",
    ),
}


def open_target(name: str) -> Target:
    """Return the target of this name, ready to try cases."""
    return TARGETS[name][0]()
