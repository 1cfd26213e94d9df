"""The command grpcurl, which knows of the services only what reflection tells it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.clients.probe import LONG_TOKENS, REVERSED, UPPER, WORD, Probe, expect, expect_usage, main

GRPCURL = Path(sys.executable).with_name("grpcurl")
CHAT = f"<|bos|><|user|>{WORD}<|end|><|assistant|>"
"""What the embedded model's chat template makes of a question."""

SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "vllm.Control",
    "vllm.Inference",
)
BAD_VALUE, NOT_FOUND, UNAUTHENTICATED, DEADLINE = 64 + 3, 64 + 5, 64 + 16, 64 + 4
"""The command's exit statuses: 64 and gRPC's code."""


def program(probe: Probe) -> None:
    """Try what the command offers."""
    reflection(probe)
    generation(probe)
    control(probe)
    errors(probe)


class Refused(Exception):
    """The command ended with an error: its exit status."""


def run(probe: Probe, *arguments: str, key: str = "") -> str:
    """Run the command and return what it prints. Raises Refused."""
    header = f"authorization: Bearer {key or probe.key}"
    ended = subprocess.run(
        [GRPCURL, "-plaintext", "-H", header, *arguments], capture_output=True, text=True, timeout=120
    )
    print(ended.stdout, ended.stderr, file=sys.stderr)
    if ended.returncode:
        raise Refused(ended.returncode)
    return ended.stdout


def call(probe: Probe, method: str, request: dict[str, Any], *options: str, key: str = "") -> list[Any]:
    """Call a method with JSON, and return the messages that answer it. Raises Refused."""
    said = run(probe, "-d", json.dumps(request), *options, probe.rpc, method, key=key)
    messages: list[Any] = []
    decoder, at = json.JSONDecoder(), 0
    while at < len(said.rstrip()):
        message, at = decoder.raw_decode(said, at)
        messages.append(message)
        at += len(said[at:]) - len(said[at:].lstrip())
    return messages


def reflection(probe: Probe) -> None:
    """List the services, and describe one and a message."""
    with probe.tries("list"):
        expect(tuple(run(probe, probe.rpc, "list").split()), SERVICES)
    with probe.tries("list of a service's calls"):
        calls = run(probe, probe.rpc, "list", "vllm.Inference").split()
        expect(calls, ["vllm.Inference.Generate", "vllm.Inference.GenerateStream"])
    with probe.tries("describe"):
        assert "rpc Generate " in run(probe, probe.rpc, "describe", "vllm.Inference")
        assert "string lora_name = 15" in run(probe, probe.rpc, "describe", "vllm.GenerateRequest")


def generation(probe: Probe) -> None:
    """Generate text, whole and in parts, and leave a stream."""
    with probe.tries("plain"):
        (answer,) = call(probe, "vllm.Inference/Generate", {"text": CHAT})
        expect(answer["outputs"]["text"], WORD)
        info = answer["outputs"]["finish_info"]
        expect(info["finish_reason"], "STOP")
        expect_usage(answer["prompt_info"]["num_prompt_tokens"], info["num_output_tokens"])
    with probe.tries("adapter"):
        (answer,) = call(probe, "vllm.Inference/Generate", {"text": CHAT, "lora_name": "reverse"})
        expect(answer["outputs"]["text"], REVERSED)
    with probe.tries("stream"):
        parts = call(probe, "vllm.Inference/GenerateStream", {"text": CHAT, "lora_name": "upper"})
        expect("".join(part["outputs"].get("text", "") for part in parts), UPPER)
        assert len(parts) > 1
        expect(parts[-1]["outputs"]["finish_info"]["num_output_tokens"], len(UPPER) + 1)
    with probe.tries("logprobs"):
        asked = {"output_logprobs": True, "output_token_ids": True, "output_candidates": {"top_n": 2}}
        (answer,) = call(probe, "vllm.Inference/Generate", {"text": CHAT, "response": asked})
        outputs = answer["outputs"]
        expect((len(outputs["logprobs"]), len(outputs["token_ids"])), (outputs["num_tokens"],) * 2)
        expect({len(each["tokens"]) for each in outputs["candidate_tokens"]}, {1})  # beside the token itself
    with probe.tries("stop"):
        (answer,) = call(
            probe, "vllm.Inference/Generate", {"text": CHAT, "stopping": {"stop_strings": ["d"]}}
        )
        expect((answer["outputs"]["text"], answer["outputs"]["finish_info"]["stop_string"]), ("gar", "d"))
    with probe.tries("cancel"), probe.sees_abort():
        long = {"text": CHAT, "stopping": {"max_new_tokens": LONG_TOKENS, "ignore_eos": True}}
        expect_refused(DEADLINE, probe, "vllm.Inference/GenerateStream", long, "-max-time", "2")


def control(probe: Probe) -> None:
    """Ask for the health, the model and its adapters."""
    with probe.tries("health"):
        for service in ("", "vllm.Inference", "vllm.Control"):
            expect(call(probe, "grpc.health.v1.Health/Check", {"service": service}), [{"status": "SERVING"}])
    with probe.tries("GetServerInfo and GetModelInfo"):
        (server,) = call(probe, "vllm.Control/GetServerInfo", {})
        assert server["max_model_len"] > 0
        (model,) = call(probe, "vllm.Control/GetModelInfo", {})
        expect((model["served_model_name"], model["supports_lora"]), ("demo", True))
    with probe.tries("ListLoras"):
        (listed,) = call(probe, "vllm.Control/ListLoras", {})
        assert {"reverse", "upper"} <= {adapter["lora_name"] for adapter in listed["adapters"]}


def errors(probe: Probe) -> None:
    """Ask for what must fail: each has a code of its own."""
    with probe.tries("error"):
        expect_refused(NOT_FOUND, probe, "vllm.Inference/Generate", {"text": WORD, "lora_name": "missing"})
    with probe.tries("a wrong key"):
        expect_refused(UNAUTHENTICATED, probe, "vllm.Control/ListLoras", {}, key="wrong")
    with probe.tries("a prompt that is too long"):
        expect_refused(BAD_VALUE, probe, "vllm.Inference/Generate", {"text": WORD * 1000})


def expect_refused(
    status: int, probe: Probe, method: str, request: dict[str, Any], *options: str, key: str = ""
) -> None:
    """Raise AssertionError unless the command ends with this status."""
    try:
        call(probe, method, request, *options, key=key)
    except Refused as refused:
        expect(refused.args[0], status)
    else:
        raise AssertionError(f"{method} was answered")


if __name__ == "__main__":
    main(program)
