"""Every declared field changes what is generated or told, or is refused by its name: none is passed over."""

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor

from engine.rpc.rpc_guard import REQUEST_ID
from engine.rpc.wire import control_pb2
from tests.engine.rpc.door import Ask, Door, at_door, refusal

PLAIN = Ask(text="hi", temperature=1, stopping={"max_new_tokens": 9}, sampling={"seed": 1})

FIELDS: Mapping[str, Ask] = {
    "request_id": Ask(request_id="mine"),
    "model": Ask(model="other"),
    "text": Ask(text="ho"),
    "token_ids": Ask(token_ids={"ids": [1]}),
    "token_ids.ids": Ask(token_ids={"ids": [1, 2]}),
    "temperature": Ask(temperature=0.5),
    "sampling": Ask(sampling={"top_k": 3}),
    "sampling.num_sequences": Ask(sampling={"num_sequences": 2}),
    "sampling.top_k": Ask(sampling={"top_k": 3}),
    "sampling.top_p": Ask(sampling={"top_p": 0.5}),
    "sampling.min_p": Ask(sampling={"min_p": 0.5}),
    "sampling.seed": Ask(sampling={"seed": 2}),
    "decoding": Ask(decoding={"presence_penalty": 1}),
    "decoding.presence_penalty": Ask(decoding={"presence_penalty": 1}),
    "decoding.frequency_penalty": Ask(decoding={"frequency_penalty": 1}),
    "decoding.repetition_penalty": Ask(decoding={"repetition_penalty": 2}),
    "decoding.logit_bias": Ask(decoding={"logit_bias": {5: 1}}),
    "decoding.json": Ask(decoding={"json": '{"type": "null"}'}),
    "decoding.regex": Ask(decoding={"regex": "a+"}),
    "decoding.choice": Ask(decoding={"choice": {"choices": ["a"]}}),
    "decoding.choice.choices": Ask(decoding={"choice": {"choices": ["a", "b"]}}),
    "decoding.grammar": Ask(decoding={"grammar": "start: /a/"}),
    "decoding.json_object": Ask(decoding={"json_object": True}),
    "stopping": Ask(stopping={"max_new_tokens": 3}),
    "stopping.max_new_tokens": Ask(stopping={"max_new_tokens": 3}),
    "stopping.min_new_tokens": Ask(stopping={"min_new_tokens": 3}),
    "stopping.stop_token_ids": Ask(stopping={"stop_token_ids": [7]}),
    "stopping.stop_strings": Ask(stopping={"stop_strings": ["ea"]}),
    "stopping.include_stop_strings": Ask(stopping={"include_stop_strings": True}),
    "stopping.ignore_eos": Ask(stopping={"ignore_eos": True}),
    "response": Ask(response={"output_token_ids": True}),
    "response.prompt_token_ids": Ask(response={"prompt_token_ids": True}),
    "response.prompt_logprobs": Ask(response={"prompt_logprobs": True}),
    "response.prompt_candidates": Ask(response={"prompt_candidates": {"top_n": 2}}),
    "response.prompt_candidates.top_n": Ask(response={"prompt_candidates": {"top_n": 3}}),
    "response.prompt_candidates.token_ids": Ask(response={"prompt_candidates": {"token_ids": {"ids": [1]}}}),
    "response.prompt_candidates.token_ids.ids": Ask(
        response={"prompt_candidates": {"token_ids": {"ids": [1]}}}
    ),
    "response.prompt_candidates.all": Ask(response={"prompt_candidates": {"all": True}}),
    "response.output_text": Ask(response={"output_text": False}),
    "response.output_token_ids": Ask(response={"output_token_ids": True}),
    "response.output_logprobs": Ask(response={"output_logprobs": True}),
    "response.output_candidates": Ask(response={"output_candidates": {"top_n": 2}}),
    "response.output_candidates.top_n": Ask(response={"output_candidates": {"top_n": 3}}),
    "response.output_candidates.token_ids": Ask(response={"output_candidates": {"token_ids": {"ids": [1]}}}),
    "response.output_candidates.token_ids.ids": Ask(
        response={"output_candidates": {"token_ids": {"ids": [1]}}}
    ),
    "response.output_candidates.all": Ask(response={"output_candidates": {"all": True}}),
    "response.skip_special_tokens": Ask(response={"skip_special_tokens": False}),
    "response.logprobs_mode": Ask(response={"logprobs_mode": "processed_logprobs"}),
    "kv": Ask(kv={"cache_salt": "mine"}),
    "kv.cache_salt": Ask(kv={"cache_salt": "mine"}),
    "priority": Ask(priority=5),
    "session_id": Ask(session_id="x" * 513),
    "lora_name": Ask(lora_name="poet"),
}
"""A value of each field that asks for something else than `PLAIN`. A session is a label, of bounded length."""

UNDECLARED = [
    (b"\x1a\x02hi\x52\x02\x08\x01", "bypass_prefix_cache"),
    (b"\x1a\x02hi\x52\x04\x1a\x02\x0a\x00", "kv_transfer_params"),
    (b"\x1a\x02hi\x58\x05", "truncate_prompt_tokens"),
    (b"\x1a\x02hi\x72\x02\x08\x01", "media"),
    (b"\x1a\x02hi\x3a\x02\x28\x07", "allowed_token_ids"),
    (b"\x1a\x02hi\x3a\x03\x5a\x01x", "structural_tag"),
    (b"\x22\x05\x0a\x01\x01\x18\x07", "field 3 of TokenIds"),
    (b"\x1a\x02hi\x4a\x06\x3a\x04\x08\x01\x28\x07", "field 5 of CandidateTokens"),
    (b"\x1a\x02hi\xfa\x01\x01x", "field 31 of GenerateRequest"),
]


def paths(kind: Descriptor, prefix: str = "") -> Iterator[str]:
    """Name every field at every depth; the entries of a map are one field."""
    for field in kind.fields:
        yield prefix + field.name
        inner = field.message_type
        if inner is not None and not inner.GetOptions().map_entry:
            yield from paths(inner, f"{prefix}{field.name}.")


async def outcome(door: Door, ask: Ask) -> tuple[Any, ...]:
    """What the engine was asked, what was told, or which field was refused."""
    for asked in (door.node.submitted, door.node.priorities, door.node.salts):
        asked.clear()
    call = door.stream(ask)
    try:
        told = [part.SerializeToString() async for part in call]
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    metadata = dict(await call.initial_metadata())
    origins = (*door.node.priorities, *door.node.salts)
    return tuple(door.node.submitted), origins, told, metadata[REQUEST_ID] == "mine"


def test_every_field_is_in_the_table() -> None:
    assert sorted(paths(Ask.DESCRIPTOR)) == sorted(FIELDS)


def test_every_field_changes_something_or_is_refused_by_name() -> None:
    async def scenario(door: Door) -> None:
        plain = await outcome(door, PLAIN)
        assert plain == await outcome(door, PLAIN)
        for path, part in FIELDS.items():
            ask = Ask()
            ask.CopyFrom(PLAIN)
            ask.MergeFrom(part)
            found = await outcome(door, ask)
            assert found != plain, f"{path} is passed over"
            if isinstance(found[0], grpc.StatusCode):
                assert found[0] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
                named = path.removesuffix(".ids").removesuffix(".token_ids").removesuffix(".all")
                assert named.rpartition(".")[2] in found[1], (path, found)

    at_door(scenario)


@pytest.mark.parametrize(("sent", "name"), UNDECLARED, ids=[name for _, name in UNDECLARED])
def test_what_is_not_declared_is_refused_by_name_at_any_depth(sent: bytes, name: str) -> None:
    async def scenario(door: Door) -> None:
        code, details = await refusal(door.channel.unary_unary("/vllm.Inference/Generate")(sent))
        assert (code, details.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, name)

    at_door(scenario)


def test_every_call_refuses_what_is_not_declared() -> None:
    async def scenario(door: Door) -> None:
        for method in control_pb2.DESCRIPTOR.services_by_name["Control"].methods:
            call = door.channel.unary_unary(f"/vllm.Control/{method.name}")(b"\xfa\x01\x01x")
            code, details = await refusal(call)
            assert (code, "field 31" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), method.name
        assert not door.stop.is_set()

    at_door(scenario)


def test_what_is_not_declared_and_asks_for_nothing_is_taken() -> None:
    async def scenario(door: Door) -> None:
        for sent in (b"\x1a\x02hi\x52\x00", b"\x1a\x02hi\x60\x00", b"\x1a\x02hi\x3a\x02\x50\x00"):
            assert await door.channel.unary_unary("/vllm.Inference/Generate")(sent)

    at_door(scenario)
