"""POST /v1/chat/completions as OpenAI's own client sees it."""

import openai
import pytest

from lora.format.companions import Companions
from scheduler.request import SamplingParams
from tests.engine.api.session import HI, TOKENIZER, events, session
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer


async def test_a_conversation_goes_through_the_template_and_is_answered() -> None:
    async with session() as api:
        api.engine.says = lambda model, prompt: f"<{prompt}>"
        response = await api.openai.chat.completions.create(
            model="team/coder",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"},
            ],
        )
        said = response.choices[0].message
        assert said.role == "assistant"
        assert said.content == "<system: be brief\nuser: a\nb\nassistant: c\nuser: d\nassistant: >"
        assert response.choices[0].finish_reason == "stop"
        assert (response.model, response.object) == ("team/coder", "chat.completion")
        assert response.id.startswith("chatcmpl-")


async def test_tokens_are_unlimited_by_default_and_limited_under_either_name() -> None:
    async with session() as api:
        await api.openai.chat.completions.create(model="base", messages=HI)
        await api.openai.chat.completions.create(model="base", messages=HI, max_tokens=3)
        await api.openai.chat.completions.create(model="base", messages=HI, max_completion_tokens=4)
        assert [params.max_tokens for _, _, params in api.engine.submitted] == [None, 3, 4]
        assert api.engine.submitted[0][2] == SamplingParams(max_tokens=None)


async def test_a_stream_opens_with_the_role_and_adds_up() -> None:
    async with session() as api:
        stream = await api.openai.chat.completions.create(
            model="base", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
        assert all(not chunk.choices or not chunk.choices[0].delta.role for chunk in chunks[2:])
        for index in range(2):
            parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
            assert "".join(part.delta.content or "" for part in parts) == "base heard user: hi\nassistant: "
            assert parts[-1].finish_reason == "stop"
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 2 * len("base heard user: hi\nassistant: .")


async def test_logprobs_name_tokens_and_their_bytes() -> None:
    async with session() as api:
        api.engine.says = lambda model, prompt: "é"
        response = await api.openai.chat.completions.create(
            model="base", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2
        )
        logprobs = response.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [entry.token for entry in logprobs.content] == [r"bytes:\xc3", r"bytes:\xa9"]
        assert bytes(byte for entry in logprobs.content for byte in entry.bytes or ()) == "é".encode()
        assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]
        assert response.choices[0].message.content == "é"


async def test_streamed_logprobs_are_not_lost_while_text_is_held_back() -> None:
    async with session() as api:
        api.engine.says = lambda model, prompt: "é!"
        body = {"model": "base", "messages": HI, "logprobs": True, "stream": True}
        chunks = events((await api.post("/v1/chat/completions", body)).body)[1:-1]
        entries = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == [r"bytes:\xc3", r"bytes:\xa9", "!", "<|end|>"]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "é!"


async def test_prompt_logprobs_come_with_the_first_chunk() -> None:
    async with session() as api:
        body = {"model": "base", "messages": HI, "prompt_logprobs": 0, "stream": True}
        chunks = events((await api.post("/v1/chat/completions", body)).body)[:-1]
        shown = [chunk.get("prompt_logprobs") for chunk in chunks]
        assert len(shown[0]) == len(TOKENIZER.encode_chat(HI))
        assert shown[1:] == [None] * (len(shown) - 1)
        whole = (await api.post("/v1/chat/completions", body | {"stream": False})).json
        assert whole["prompt_logprobs"] == shown[0]
        unasked = (await api.post("/v1/chat/completions", {"model": "base", "messages": HI})).json
        assert unasked["prompt_logprobs"] is None


async def test_a_template_that_refuses_and_a_model_without_one_are_bad_requests() -> None:
    async with session() as api:
        with pytest.raises(openai.BadRequestError, match="no such talk"):
            await api.openai.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "refuse me"}]
            )
    plain = type(TOKENIZER)(byte_tokenizer(chat_template=None))
    async with session(FakeClient(plain)) as api:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            await api.openai.chat.completions.create(model="base", messages=HI)


async def test_a_conversation_with_an_adapter_is_written_by_its_own_template() -> None:
    async with session() as api:
        own = Companions("{{ messages[0].content }}?")
        api.engine.tokenizers["poet"] = TOKENIZER.of_adapter(own)
        for model, text in (("poet", "hi?"), ("base", "user: hi\nassistant: ")):
            await api.post("/v1/chat/completions", {"model": model, "messages": HI, "max_tokens": 1})
            assert TOKENIZER.decode(api.engine.submitted[-1][1]) == text
            counted = await api.post("/tokenize", {"model": model, "messages": HI})
            assert TOKENIZER.decode(counted.json["tokens"]) == text
