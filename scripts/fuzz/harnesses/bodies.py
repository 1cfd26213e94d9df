"""Try spoilt bodies on every route that takes JSON: never a 5xx, a hang, or anything left behind."""

import http.client
import json
import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engine.api import schema
from scripts.fuzz.case import Case, Finding
from scripts.fuzz.harnesses.sound_bodies import SOUND
from scripts.fuzz.live_node import ANSWER_S, LiveNode
from scripts.fuzz.mutators import spoilt_json

_TURN = {"role": "user", "content": "garden"}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "garden"}]}
_FEW = {"max_tokens": 4, "temperature": 0}
BODIES: Mapping[str, tuple[type[msgspec.Struct], tuple[dict[str, Any], ...]]] = {
    "/v1/completions": (
        schema.Completion,
        (
            {"model": "demo", "prompt": "garden", **_FEW},
            {"model": "reverse", "prompt": [[1, 2], [3]], "n": 2, "logprobs": 2, "echo": True, **_FEW},
            {
                "model": "upper",
                "prompt": ["a", "b"],
                "stream": True,
                "stream_options": {"include_usage": True},
                **_FEW,
            },
        ),
    ),
    "/v1/chat/completions": (
        schema.Chat,
        (
            {"model": "demo", "messages": [_TURN], **_FEW},
            {
                "model": "rot13",
                "messages": [_PARTS, _TURN],
                "logprobs": True,
                "top_logprobs": 2,
                "seed": 1,
                **_FEW,
            },
            {
                "model": "demo",
                "messages": [_TURN],
                "stream": True,
                "stop": ["a"],
                "logit_bias": {"5": 1},
                **_FEW,
            },
        ),
    ),
    "/inference/v1/generate": (
        schema.TokenGenerate,
        (
            {"token_ids": [1, 2], "sampling_params": {"logprobs": 2, "n": 2, **_FEW}},
            {"model": "upper", "token_ids": [5], "sampling_params": _FEW, "stream": True},
        ),
    ),
    "/tokenize": (schema.Tokenize, ({"prompt": "garden"}, {"model": "demo", "messages": [_TURN]})),
    "/detokenize": (schema.Detokenize, ({"tokens": [1, 2, 3]},)),
    "/v1/load_lora_adapter": (schema.LoadAdapter, ({"lora_name": "new", "lora_path": "reverse"},)),
    "/v1/unload_lora_adapter": (schema.UnloadAdapter, ({"lora_name": "new"}, {"lora_name": "mask"})),
}
"""Every route with a body: its schema, and bodies that it answers."""


class BodiesTarget:
    """A server, to which one body at a time is sent."""

    def __init__(self) -> None:
        """Start the server."""
        self._node = LiveNode()

    def whole(self) -> list[Case]:
        """Return the bodies that are answered."""
        return [
            Case(path, json.dumps(body).encode()) for path, (_, bodies) in BODIES.items() for body in bodies
        ]

    def draw(self, chance: random.Random) -> Case:
        """Draw a route and a body for it: a sound one, a spoilt one, or one whose client leaves early."""
        path = chance.choice((*BODIES, *SOUND, *SOUND))
        kind, bodies = BODIES[path]
        fields = tuple(field.encode_name for field in msgspec.structs.fields(kind))
        body = chance.choice(bodies)
        if path in SOUND and chance.random() < 0.8:
            body = SOUND[path](chance, True)
            leaves = f" {chance.choice((0, 1, 100, 1000))}" if chance.random() < 0.1 else ""
            if leaves or chance.random() < 0.8:
                return Case(path + leaves, json.dumps(body).encode())
        return Case(path, spoilt_json(chance, body, fields))

    def run(self, case: Case) -> str:
        """Send the body and judge the response; return its status.

        A number after the case's path is how many bytes its client reads before it leaves.
        """
        path, _, most_bytes = case.head.partition(" ")
        connection = http.client.HTTPConnection(urlsplit(self._node.address).netloc, timeout=ANSWER_S)
        try:
            connection.request("POST", path, case.content, {"Content-Type": "application/json"})
            if most_bytes == "0":
                return "left"
            response = connection.getresponse()
            content = response.read(int(most_bytes) if most_bytes else None)
        except (OSError, http.client.HTTPException) as error:
            raise Finding(f"no whole response: {error!r}") from error
        finally:
            connection.close()
        if response.status >= 500:
            raise Finding(f"status {response.status}: {content[:500]!r}")
        if most_bytes:
            return "left"
        for text in _objects(response.headers.get_content_type(), content):
            _judge(response.status, text)
        return str(response.status)

    def check(self) -> None:
        """Raise Finding if the server holds anything of the requests."""
        self._node.check()

    def close(self) -> None:
        """Stop the server."""
        self._node.close()


def _objects(content_type: str, content: bytes) -> list[bytes]:
    """Return the JSON texts of a response, of which a stream has many."""
    if content_type != "text/event-stream":
        return [content]
    events = [line.removeprefix(b"data: ") for line in content.split(b"\n\n") if line]
    if events[-1] != b"[DONE]" and b'"error"' not in events[-1]:
        raise Finding(f"the stream has no end: {events[-1][:200]!r}")
    return [event for event in events if event != b"[DONE]"]


def _judge(status: int, text: bytes) -> None:
    """Raise Finding for what is no JSON object, and for an error that nobody foresaw."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise Finding(f"status {status} without JSON: {text[:200]!r}") from error
    error: Any = found.get("error")
    if status >= 400 and not (isinstance(error, dict) and "message" in error):
        raise Finding(f"status {status} without an error object: {text[:200]!r}")
    if isinstance(error, dict) and "server_error" in text.decode():
        raise Finding(f"a server error in a stream: {text[:200]!r}")
