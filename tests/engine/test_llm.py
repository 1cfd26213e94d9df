"""LLM's conversations, on the embedded model."""

import threading
from collections.abc import Iterator

import pytest

from engine import LLM, SamplingParams
from engine.config.peer_config import PeerConfig
from engine.tokenizer import InvalidChat
from transport.base import Address

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(max_model_len=128, kv_cache_bytes=8 << 20)
    yield made
    made.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_each_conversation_is_answered_under_its_own_adapter(llm: LLM) -> None:
    results = llm.chat([user("garden")] * 2, GREEDY, adapters=["reverse", None])
    assert [result.outputs[0].text for result in results] == ["nedrag", "garden"]


def test_one_conversation_alone_is_refused_with_the_remedy(llm: LLM) -> None:
    with pytest.raises(ValueError, match="give a list of lists of messages"):
        llm.chat(user("garden"), GREEDY)  # pyright: ignore[reportArgumentType]


def test_messages_that_the_template_refuses_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidChat, match="refuses these messages"):
        llm.chat([user("garden"), [5]], GREEDY)  # pyright: ignore[reportArgumentType]
    assert llm.engine.core.num_live_requests == 0


def test_closing_ends_what_is_shared_with_peers() -> None:
    peers = PeerConfig(listen=Address("127.0.0.1", 0), token="x" * 16, plain=True, path="stream")
    llm = LLM(max_model_len=64, kv_cache_bytes=1 << 20, peers=peers)
    assert any(thread.name == "peer-loop" for thread in threading.enumerate())
    llm.close()
    assert not any(thread.name == "peer-loop" for thread in threading.enumerate())
