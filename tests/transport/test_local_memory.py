"""Memory by address: what a region covers, where it may lie, and whose it is."""

import pytest

from transport.base import Memory
from transport.errors import RegionRefused
from transport.memory.local_memory import LocalMemory

ON_A_GPU = Memory(address=1 << 40, nbytes=64, device=0)


def test_a_buffer_is_seen_in_place() -> None:
    buffer = bytearray(b"0123456789")
    region = LocalMemory("test").register(Memory.of_buffer(buffer)).region(2, 3)
    assert bytes(region.view()) == b"234"
    region.view()[:] = b"abc"
    assert buffer == b"01abc56789"


def test_regions_overlap_by_address_whatever_arena_names_them() -> None:
    buffer, memory = bytearray(16), LocalMemory("test")
    one, two = memory.register(Memory.of_buffer(buffer)), memory.register(Memory.of_buffer(buffer))
    assert one.region(0, 8).overlaps(two.region(7, 2))
    assert not one.region(0, 8).overlaps(two.region(8, 8))


def test_the_same_address_on_two_devices_is_two_places() -> None:
    memory = LocalMemory("test")
    first, second = memory.register(ON_A_GPU), memory.register(Memory(ON_A_GPU.address, 64, device=1))
    assert not first.region(0, 64).overlaps(second.region(0, 64))


def test_no_memory_is_refused() -> None:
    with pytest.raises(RegionRefused, match="that exists"):
        LocalMemory("test").register(Memory(address=4096, nbytes=0))


def test_another_nodes_arena_is_refused() -> None:
    ours, theirs = LocalMemory("ours"), LocalMemory("theirs")
    region = theirs.register(Memory.of_buffer(bytearray(8))).region(0, 8)
    with pytest.raises(RegionRefused, match="register it here"):
        ours.publish("stolen", [region])
