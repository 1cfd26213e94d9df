"""Nothing travels in the clear beyond this machine unless somebody chose that; secrets stay out of sight."""

import asyncio
from pathlib import Path

import pytest

from scripts.certificates import make_certificates
from tests.transport.asynchronous import asynchronous
from tests.transport.node_setup import TOKEN, Setup
from transport.base import Address
from transport.control.security import Security, TlsFiles, is_loopback
from transport.errors import HelloRefused, TransportError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_this_machine(host: str) -> None:
    assert is_loopback(host)
    Security(TOKEN).check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org", "localhost.example.org"])
def test_plain_tcp_leaves_the_machine_only_by_choice(host: str, tmp_path: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(HelloRefused, match="give TLS files"):
        Security(TOKEN).check_host(host)
    Security(TOKEN, plain_network=True).check_host(host)
    Security(TOKEN, TlsFiles(tmp_path, tmp_path, tmp_path)).check_host(host)


def test_a_node_does_not_listen_in_the_clear_on_a_network() -> None:
    with pytest.raises(HelloRefused, match=r"0\.0\.0\.0"):
        Setup(host="0.0.0.0").open("careless")


@asynchronous
async def test_a_node_does_not_dial_in_the_clear_into_a_network() -> None:
    puller = Setup().open("puller")
    with pytest.raises(HelloRefused, match=r"192\.0\.2\.1"):
        await puller.lease(Address("192.0.2.1", 9), "anything", 5.0)
    await puller.close()


def test_a_short_token_is_refused_and_no_token_is_shown() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Security("short")
    assert TOKEN not in repr(Security(TOKEN))


@asynchronous
async def test_a_certificate_must_name_the_host_that_is_dialled(tmp_path: Path) -> None:
    elsewhere = make_certificates(tmp_path, ["192.0.2.1"])
    source, puller = Setup(tls=elsewhere).open("source"), Setup(tls=elsewhere).open("puller")
    with pytest.raises(HelloRefused, match="CERTIFICATE_VERIFY_FAILED"):
        await puller.lease(source.address, "anything", 5.0)
    await asyncio.gather(puller.close(), source.close())


@asynchronous
async def test_a_plain_puller_at_a_tls_source_fails_by_name(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path, ["127.0.0.1"])
    source, puller = Setup(tls=tls).open("source"), Setup().open("puller")
    with pytest.raises(TransportError):
        await puller.lease(source.address, "anything", 5.0)
    await asyncio.gather(puller.close(), source.close())


@asynchronous
async def test_a_tls_puller_at_a_plain_source_is_told_that_it_may_be_plain(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path, ["127.0.0.1"])
    source, puller = Setup().open("source"), Setup(tls=tls).open("puller")
    with pytest.raises(HelloRefused, match=r"WRONG_VERSION_NUMBER; the other end may speak plain TCP"):
        await puller.lease(source.address, "anything", 5.0)
    await asyncio.gather(puller.close(), source.close())
