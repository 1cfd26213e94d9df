"""Messages survive the wire; anything else is refused by name, however it was damaged."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chance import examples
from transport.base import RemoteRegion
from transport.control.messages import (
    LENGTH,
    MOST_FRAME_BYTES,
    Bytes,
    Challenge,
    Grant,
    Hello,
    LeaseReleased,
    LeaseRequest,
    Message,
    Proof,
    Read,
    Refusal,
    ReleaseLease,
    Welcome,
    body_bytes,
    decode,
    encode,
    error_of,
    refusal_of,
)
from transport.errors import HelloRefused, LeaseExpired, NotOffered, PullTimeout, WireError

REGION = RemoteRegion("node", 1, 4096, 10, -1, 77)
MESSAGES = [
    Hello(1, "a", "n"),
    Challenge(1, "b", "n", "p"),
    Proof("p"),
    Welcome({"stream": "", "ucx": "x"}),
    LeaseRequest("adapter ü", 2.5, "stream"),
    Grant(77, 2.5, "", (REGION, REGION)),
    Read(),
    Bytes(1 << 40),
    ReleaseLease(read=True, confirm=False),
    LeaseReleased(),
    Refusal("NotOffered", "why"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    frame = encode(message)
    assert body_bytes(frame[: LENGTH.size]) == len(frame) - LENGTH.size
    assert decode(frame[LENGTH.size :]) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_truncated_message_is_refused(message: Message) -> None:
    body = encode(message)[LENGTH.size :]
    for end in range(len(body)):
        with pytest.raises(WireError):
            decode(body[:end])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_missing_or_an_unknown_field_is_refused(message: Message) -> None:
    body = json.loads(encode(message)[LENGTH.size :])
    for name in body:
        with pytest.raises(WireError):
            decode(json.dumps({other: value for other, value in body.items() if other != name}).encode())
    with pytest.raises(WireError):
        decode(json.dumps(body | {"more": 1}).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(300))
@given(message=st.sampled_from(MESSAGES), key=st.integers(0, 5), value=JSON)
def test_a_forged_field_is_refused_or_is_of_the_right_kind(message: Message, key: int, value: object) -> None:
    body = json.loads(encode(message)[LENGTH.size :])
    name = sorted(body)[key % len(body)]
    body[name] = value
    try:
        got = decode(json.dumps(body).encode())
    except WireError:
        return
    assert decode(encode(got)[LENGTH.size :]) == got


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(300))
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_noise_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        decode(body)


@pytest.mark.parametrize("nbytes", [0, 1, MOST_FRAME_BYTES + 1, (1 << 32) - 1])
def test_a_length_that_no_message_has_is_refused(nbytes: int) -> None:
    with pytest.raises(WireError, match="not this protocol"):
        body_bytes(LENGTH.pack(nbytes))


@pytest.mark.parametrize(
    "forged",
    [
        {"nbytes": -1},
        {"nbytes": 0},
        {"nbytes": 1 << 63},
        {"address": -8},
        {"address": (1 << 64) - 4},
        {"key": "77"},
        {"nbytes": True},
        {"more": 1},
    ],
)
def test_a_forged_region_is_refused(forged: dict[str, object]) -> None:
    body = json.loads(encode(Grant(77, 2.5, "", (REGION,)))[LENGTH.size :])
    body["regions"][0].update(forged)
    with pytest.raises(WireError):
        decode(json.dumps(body).encode())


def test_a_region_is_plain_numbers_in_json() -> None:
    plain = json.loads(msgspec.json.encode(REGION))
    assert plain == {"node": "node", "arena": 1, "address": 4096, "nbytes": 10, "device": -1, "key": 77}
    assert msgspec.convert(plain, RemoteRegion) == REGION


@pytest.mark.parametrize("field", ["hold_s", "ticket"])
@pytest.mark.parametrize(
    "number", ["-1", "9223372036854775808", "1e400", "NaN", "Infinity", "true", "null", '"1"']
)
def test_a_number_out_of_range_or_of_another_kind_is_refused(field: str, number: str) -> None:
    values = {
        "kind": '"Grant"',
        "ticket": "7",
        "hold_s": "2.5",
        "metadata": '""',
        "regions": "[]",
        field: number,
    }
    body = ",".join(f'"{name}":{value}' for name, value in values.items())
    with pytest.raises(WireError):
        decode(f"{{{body}}}".encode())


@pytest.mark.parametrize("number", ["1.0", "1e2", "0.5"])
def test_a_fraction_is_no_count(number: str) -> None:
    with pytest.raises(WireError):
        decode(f'{{"kind":"Bytes","nbytes":{number}}}'.encode())


@pytest.mark.parametrize("around", [" %s", "%s ", "%s\n", "%s{}", "[%s]", "\ufeff%s"])
def test_anything_around_a_message_is_refused(around: str) -> None:
    assert decode(b'{"kind":"Read"}') == Read()
    with pytest.raises(WireError):
        decode((around % '{"kind":"Read"}').encode())


@pytest.mark.parametrize("depth", [10, 100_000])
def test_a_deeply_nested_message_is_refused(depth: int) -> None:
    with pytest.raises(WireError):
        decode(b'{"kind":"Welcome","capabilities":' + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize("error", [NotOffered("n"), HelloRefused("h"), LeaseExpired("l"), WireError("w")])
def test_a_refusal_is_raised_at_the_other_end_under_its_name(error: Exception) -> None:
    assert isinstance(error, NotOffered | HelloRefused | LeaseExpired | WireError)
    raised = error_of(refusal_of(error))
    assert type(raised) is type(error)
    assert str(raised) == str(error)


def test_what_the_other_end_cannot_know_is_a_wire_error_there() -> None:
    assert type(error_of(refusal_of(PullTimeout("here only")))) is WireError
    assert type(error_of(Refusal("SystemExit", "nice try"))) is WireError
