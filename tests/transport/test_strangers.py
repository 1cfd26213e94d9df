"""What strangers say breaks nothing: no thread ends by it, and the log stays short and one line an entry."""

import json
import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chance import examples
from tests.transport.impostor import SOON_S
from tests.transport.node_setup import TOKEN
from transport.base import Address
from transport.control.messages import (
    LENGTH,
    MOST_STRANGER_BYTES,
    VERSION,
    Hello,
    Refusal,
    decode,
    encode,
    error_of,
    printable,
    refusal_of,
)
from transport.control.security import Authenticator, Security
from transport.errors import NotOffered, WireError
from transport.memory.local_memory import LocalMemory
from transport.server import REFUSALS_LOGGED, TransportServer

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates and controls too


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    authenticator = Authenticator(Security(TOKEN), "source")
    server = TransportServer(Address("127.0.0.1", 0), authenticator, LocalMemory("source"), [], 1.0)
    yield server.address
    server.close()


@pytest.fixture(scope="module")
def crashes() -> Iterator[list[threading.ExceptHookArgs]]:
    """The threads that ended by an exception."""
    found: list[threading.ExceptHookArgs] = []
    kept, threading.excepthook = threading.excepthook, found.append
    yield found
    threading.excepthook = kept


def frame(value: object) -> bytes:
    body = json.dumps(value).encode()
    return LENGTH.pack(len(body)) + body


def said_to(address: Address, said: bytes) -> bytes:
    """What the server answers until it hangs up."""
    answer = b""
    with socket.create_connection((address.host, address.port), SOON_S) as sock:
        try:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            while some := sock.recv(65_536):
                answer += some
        except OSError:
            pass  # a reset ends it like a good-bye
    return answer


FRAMES = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("Hello"), "version": st.just(VERSION), "node": ANY_TEXT, "nonce": ANY_TEXT}
    ),
    st.fixed_dictionaries({"kind": st.just("Proof"), "proof": ANY_TEXT}),
    st.fixed_dictionaries({"kind": st.just("Refusal"), "error": ANY_TEXT, "detail": ANY_TEXT}),
    st.fixed_dictionaries(
        {"kind": st.just("Hello")}, optional={"node": st.integers(), "\n\x1b[31m": st.none()}
    ),
    st.fixed_dictionaries({"kind": ANY_TEXT}),
)


@settings(max_examples=examples(150), deadline=None)
@given(
    said=st.binary(max_size=64) | st.lists(FRAMES, max_size=3).map(lambda some: b"".join(map(frame, some)))
)
def test_whatever_is_said_no_thread_ends_by_it(
    said: bytes, address: Address, crashes: list[threading.ExceptHookArgs]
) -> None:
    assert b"Welcome" not in said_to(address, said)
    assert crashes == []


@pytest.mark.parametrize("field", ["node", "nonce"])
def test_half_a_surrogate_pair_is_no_message(
    field: str, address: Address, crashes: list[threading.ExceptHookArgs]
) -> None:
    hello = {"kind": "Hello", "version": VERSION, "node": "n", "nonce": "00"} | {field: "\ud800"}
    with pytest.raises(WireError, match="is no message"):
        decode(json.dumps(hello).encode())
    assert b"WireError" in said_to(address, frame(hello))
    assert decode(json.dumps(hello | {field: "\U0001f600"}).encode())
    assert crashes == []


def test_a_stranger_cannot_make_the_server_read_much(address: Address) -> None:
    announced = LENGTH.pack(MOST_STRANGER_BYTES + 1)
    assert b"not this protocol" in said_to(address, announced)
    assert b"not this protocol" in said_to(address, encode(Hello(VERSION, "n", "0")) + announced)


def test_the_log_of_strangers_is_bounded_and_each_entry_is_one_line(
    caplog: pytest.LogCaptureFixture, crashes: list[threading.ExceptHookArgs]
) -> None:
    caplog.set_level(logging.INFO)
    authenticator = Authenticator(Security(TOKEN), "source")
    server = TransportServer(Address("127.0.0.1", 0), authenticator, LocalMemory("source"), [], 1.0)
    forged = "no\n2026-01-01 CRITICAL engine: all is lost \x1b[31m" + "!" * 3000
    for _ in range(3 * REFUSALS_LOGGED):
        said_to(server.address, encode(Refusal("HelloRefused", forged)))
    server.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == REFUSALS_LOGGED
    assert all(line.isprintable() and len(line) < 500 and "hanging up on" in line for line in told)
    assert crashes == []


def test_a_text_for_a_log_is_short_and_of_one_line() -> None:
    assert printable("adapter ü 'x'") == "adapter ü 'x'"
    assert printable("a\r\n\x1b\ud800\u202e") == r"a\r\n\x1b\ud800\u202e"
    assert len(printable("x" * 10_000)) == 300


def test_a_refusal_fits_a_frame_whatever_was_asked_for() -> None:
    refusal = refusal_of(NotOffered("x" * (2 << 20) + "\ud800"))
    assert isinstance(error_of(refusal), NotOffered)
    assert len(encode(refusal)) < 4096
