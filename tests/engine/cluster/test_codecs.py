"""Reports and views that travel as changes are what they were at the other end, whatever came before."""

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.catalogue.base import CatalogueEntry
from engine.cluster.control import report_codec, view_codec
from engine.cluster.control.control_messages import (
    VERSION,
    DropOrder,
    MemberHello,
    ReportChange,
    RouterReportChange,
    ViewChange,
    encoded,
    read_from_coordinator,
    read_from_member,
)
from engine.cluster.control.control_values import (
    ControlFault,
    WireAdapter,
    WireHardware,
)
from engine.cluster.control.report_codec import (
    ReportDecoder,
    ReportEncoder,
    RouterReportDecoder,
    RouterReportEncoder,
)
from engine.cluster.control.view_codec import SharedView, ViewDecoder, ViewEncoder
from engine.cluster.link import link_messages
from engine.cluster.view import Member
from lora.adapter import BASE, AdapterRef
from lora.format.companions import Companions
from scheduler.cluster.protocol.messages import NodeHardware, Report, RouterReport
from scheduler.cluster.state import OperatingPoints, RoutingTable, Share
from scheduler.request import SamplingParams

REFS = tuple(
    AdapterRef(f"{at:064x}", f"tenant/{at}", 8 << at % 4, ("q_proj", "v_proj"), 4096, (at,) * (at % 3))
    for at in range(12)
)
MACHINES = tuple(
    NodeHardware(memory, OperatingPoints((8, 64), (900.0, 300.5)), zone)
    for memory, zone in [(1 << 30, ""), (1 << 36, "b")]
)
a_ref = st.sampled_from(REFS)
refs = st.lists(a_ref, unique=True, max_size=8).map(tuple)
counts = st.integers(0, 1 << 40)
totals = st.dictionaries(a_ref, counts, max_size=6)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    return Report(
        "n1",
        draw(counts),
        draw(counts),
        draw(st.sampled_from(MACHINES)),
        draw(counts),
        draw(counts),
        draw(refs),
        draw(refs),
        draw(refs),
        tuple(draw(totals).items()),
        draw(st.floats(0.1, 100)),
    )


@pytest.mark.parametrize("ref", REFS)
def test_a_ref_arrives_with_all_that_it_says(ref: AdapterRef) -> None:
    """Refs are equal when their digests are: what else they say is looked at here."""
    order = read_from_coordinator(encoded(DropOrder(1, 2, WireAdapter.of(ref))))
    assert isinstance(order, DropOrder)
    assert repr(order.adapter.ref()) == repr(ref)
    params = SamplingParams(max_tokens=1)
    sent = link_messages.read_from_router(
        link_messages.encoded(link_messages.Submit("k", 1, ref, (1, 2), params, ()))
    )
    assert isinstance(sent, link_messages.Submit)
    assert repr(sent.ref) == repr(ref)


def crossed(report: Report, encoder: ReportEncoder, decoder: ReportDecoder) -> Report:
    message = read_from_member(encoded(encoder.encode(report)))
    assert isinstance(message, ReportChange)
    return decoder.decode(message)


@given(st.lists(reports(), max_size=12), st.sets(st.integers(0, 11)))
def test_any_sequence_of_reports_arrives_as_it_was_also_over_new_streams(
    sequence: list[Report], breaks: set[int]
) -> None:
    encoder, decoder = ReportEncoder(), ReportDecoder("n1")
    for at, report in enumerate(sequence):
        if at in breaks:
            encoder, decoder = ReportEncoder(), ReportDecoder("n1")
        assert crossed(report, encoder, decoder) == report


@given(st.lists(reports(), max_size=8))
def test_numbers_that_begin_anew_change_no_report(sequence: list[Report]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_codec, "MOST_ADAPTERS", 5)
        encoder, decoder = ReportEncoder(), ReportDecoder("n1")
        for report in sequence:
            few = replace(report, held=report.held[:2], loading=(), cached=(), taken=report.taken[:2])
            assert crossed(few, encoder, decoder) == few


@given(st.lists(st.tuples(counts, totals), max_size=12))
def test_any_sequence_of_a_routers_reports_arrives_as_it_was(
    sequence: list[tuple[int, dict[AdapterRef, int]]],
) -> None:
    encoder, decoder = RouterReportEncoder(), RouterReportDecoder("r1")
    for version, refused in sequence:
        report = RouterReport("r1", version, 7, tuple(refused.items()))
        message = read_from_member(encoded(encoder.encode(report)))
        assert isinstance(message, RouterReportChange)
        got = decoder.decode(message)
        assert (got.router, got.table_version, got.session) == ("r1", version, 7)
        assert dict(got.refused) == refused


def test_tokens_of_the_base_model_arrive_although_it_is_no_adapter() -> None:
    taken = ((REFS[0], 7), (BASE, 5))
    report = Report("n1", 1, 1, MACHINES[0], taken=taken)
    assert crossed(report, ReportEncoder(), ReportDecoder("n1")).taken == taken
    message = RouterReportEncoder().encode(RouterReport("r1", 1, 7, taken))
    assert RouterReportDecoder("r1").decode(message).refused == taken


def test_a_report_like_the_last_one_names_no_adapter() -> None:
    encoder = ReportEncoder()
    report = Report("n1", 1, 1, MACHINES[0], held=REFS)
    first, second = (len(encoded(encoder.encode(replace(report, number=number)))) for number in (1, 2))
    assert second < 100 < first


@st.composite
def views(draw: st.DrawFn) -> SharedView:
    members = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 2), max_size=3))
    named = draw(st.dictionaries(st.sampled_from("pqrs"), a_ref, max_size=4))
    shares = draw(st.dictionaries(a_ref, st.sampled_from([(1.0,), (0.25, 0.75), ()]), max_size=5))
    return SharedView(
        {name: Member(name, session, f"h:{session}", None, "z") for name, session in members.items()},
        {
            name: CatalogueEntry(
                name,
                ref,
                "/x",
                Companions(draw(st.sampled_from([None, "t"]))),
                "some",
                draw(st.integers(0, 3)),
                draw(st.sampled_from(["", "q"])),
                7,
            )
            for name, ref in named.items()
        },
        RoutingTable(
            draw(counts),
            MappingProxyType(
                {
                    ref: tuple(Share(f"n{at}", part) for at, part in enumerate(parts))
                    for ref, parts in shares.items()
                }
            ),
        ),
        draw(st.booleans()),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from([(), ("r1",), ("r1", "r2")])),
    )


def told(changes: list[ViewChange], decoder: ViewDecoder) -> Iterator[SharedView]:
    for change in changes:
        message = read_from_coordinator(encoded(change))
        assert isinstance(message, ViewChange)
        view = decoder.apply(message)
        if view is not None:
            yield view


@pytest.mark.slow
@given(st.lists(views(), min_size=1, max_size=10), st.integers(0, 9), st.sampled_from([1, 200, 1 << 20]))
def test_any_sequence_of_views_arrives_as_it_was_also_at_who_comes_later(
    sequence: list[SharedView], later: int, part_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_codec, "_PART_BYTES", part_bytes)
        encoder = ViewEncoder()
        decoders = [ViewDecoder()]
        assert list(told(encoder.whole(), decoders[0])) == [SharedView()]
        last = SharedView()
        for at, view in enumerate(sequence):
            changes = encoder.advance(view)
            for decoder in decoders:
                seen = list(told(changes, decoder))
                assert seen == ([view] if view != last else [])
            last = view
            if at == later:
                decoders.append(ViewDecoder())
                assert list(told(encoder.whole(), decoders[1])) == [view]


def test_one_new_route_costs_no_more_among_many_adapters_than_among_few() -> None:
    def cost(adapters: int) -> int:
        refs = [AdapterRef(f"{at:064x}", f"a{at}", 8, ("q_proj",), 1) for at in range(adapters)]
        catalogue = {ref.name: CatalogueEntry(ref.name, ref) for ref in refs}
        encoder = ViewEncoder()
        encoder.advance(SharedView({}, catalogue))
        table = RoutingTable(1, {refs[0]: (Share("n1", 1.0),)})
        return sum(len(encoded(change)) for change in encoder.advance(SharedView({}, catalogue, table)))

    assert cost(300) == cost(3) < 80


def test_where_one_thing_changes_the_others_are_not_copied() -> None:
    encoder, decoder, ref = ViewEncoder(), ViewDecoder(), AdapterRef("0" * 64, "a", 8, ("q_proj",), 1)
    first = SharedView({}, {"a": CatalogueEntry("a", ref)}, RoutingTable(1, {ref: (Share("n1", 1.0),)}))
    encoder.advance(first)
    (before,) = told(encoder.whole(), decoder)
    member = Member("n1", 1, "n1:1")
    (after,) = told(encoder.advance(replace(first, members={"n1": member})), decoder)
    assert after.members == {"n1": member}
    assert after.catalogue is before.catalogue
    assert after.table is before.table


GARBAGE = [
    b"",
    b"\xc1",
    b"\x90" * 9000,
    b"\x93" + b"\xa6Report",
    msgspec.msgpack.encode(["MemberHello", VERSION, "", "node", 1]),
    msgspec.msgpack.encode(["MemberHello", VERSION, "n" * 300, "node", 1]),
    msgspec.msgpack.encode(["MemberHello", VERSION, "n", "king", 1]),
    msgspec.msgpack.encode(["MemberHello", VERSION, "n", "node", -1]),
    msgspec.msgpack.encode(["MemberHello", VERSION, "n", "node", 1, "", "", "", "", 0, "", "more"]),
    encoded(MemberHello(VERSION, "n", "node", 1)) + b"\x00",
]


@pytest.mark.parametrize("frame", GARBAGE)
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(ControlFault):
        read_from_member(frame)
    with pytest.raises(ControlFault):
        read_from_coordinator(frame)


def test_changes_against_what_was_never_told_are_refused() -> None:
    encoder = ReportEncoder()
    encoder.encode(Report("n1", 1, 1, MACHINES[0], held=REFS[:2]))
    later = encoder.encode(Report("n1", 1, 2, MACHINES[0], held=REFS[:3]))
    with pytest.raises(ControlFault, match="not whole"):
        ReportDecoder("n1").decode(later)
    with pytest.raises(ControlFault, match="names no machine"):
        ReportDecoder("n1").decode(msgspec.structs.replace(later, whole=True))
    machine = WireHardware.of(MACHINES[0])
    with pytest.raises(ControlFault, match="never named"):
        ReportDecoder("n1").decode(msgspec.structs.replace(later, whole=True, machine=machine))
    with pytest.raises(ControlFault, match="not whole"):
        ViewDecoder().apply(ViewChange(False, True, True, 1))
    with pytest.raises(ControlFault, match="never named"):
        ViewDecoder().apply(ViewChange(True, True, True, 1, routes_gone=(3,)))
