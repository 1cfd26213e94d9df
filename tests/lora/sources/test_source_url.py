"""Tests of which URLs are read, what they allow, and what nobody is shown."""

from pathlib import Path

import pytest

from lora.sources.allowed_sources import AllowedSources, SourceTemplate
from lora.sources.source_url import InvalidSource, SourceUrl, shown_source, source_of


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/adapters/one", "gs://bucket/one", "https://host:8443/a/b", "http://[::1]:80/a",
        "hf://org/repo", "hf://org/repo@v1.2", "hf://repo@refs/pr/1", "file:///data/one", "https://host/a?sig=x",
    ],
)  # fmt: skip
def test_a_url_is_read_and_written_back(text: str) -> None:
    url = source_of(text)
    assert isinstance(url, SourceUrl)
    assert source_of(url.text) == url
    assert url.text == text.replace(":80/", "/")


@pytest.mark.parametrize(
    "text",
    [
        "s3://", "s3:///key", "https://", "https://user:hunter2@host/a", "https://user@host/a", "s3://key:hunter2@bucket/a",
        "https://host/a/../b", "https://host/a/%2e%2e/b", "https://host/a/%252e%252e/b", "https://host/a%2fb",
        "https://host/a//b", "https://host/a\\b", "https://host/a b", "https://host/ä", "https://host/a#b",
        "https://host:port/a", "https://host:99999/a", "s3://bucket/a?versionId=1", "file://host/a", "hf://a/b/c",
        "hf://", "hf://org/repo@../x", "hf://org/repo@", "https://host/%00", "https://ho st/a",
        "https://host/" + "a" * 2048,
    ],
)  # fmt: skip
def test_what_some_server_could_read_otherwise_is_no_url(text: str) -> None:
    with pytest.raises(InvalidSource) as refusal:
        SourceUrl.parse(text)
    assert "hunter2" not in str(refusal.value)


def test_a_path_is_no_url() -> None:
    assert source_of("adapters/one") == Path("adapters/one")
    assert source_of("/a:b//c") == Path("/a:b//c")


def test_a_signed_query_is_shown_to_nobody() -> None:
    url = SourceUrl.parse("https://host/a?sig=secret")
    assert "secret" not in f"{url} {url!r} {url.shown} {shown_source(url.text)}"
    assert url.of_file("f").text == "https://host/a/f?sig=secret"
    assert shown_source("https://user:secret@host/a") == "(hidden)"


@pytest.mark.parametrize(
    ("prefix", "url", "is_allowed"),
    [
        ("s3://bucket/team", "s3://bucket/team/one", True),
        ("s3://bucket/team/", "s3://bucket/team", True),
        ("s3://bucket/team", "s3://bucket/team-b/one", False),
        ("s3://bucket", "s3://bucket-b/one", False),
        ("s3://bucket", "gs://bucket/one", False),
        ("https://host", "http://host/a", False),
        ("https://host", "https://host.evil.org/a", False),
        ("https://host", "https://host:8443/a", False),
        ("https://HOST", "https://host:443/a", True),
        ("hf://org", "hf://org/repo@main", True),
        ("hf://org", "hf://organ/repo", False),
        ("hf://org/repo", "hf://org/repo-b", False),
        ("hf://org/repo@v1", "hf://org/repo@v1", True),
        ("hf://org/repo@v1", "hf://org/repo@v2", False),
        ("hf://org/repo@v1", "hf://org/repo", False),
    ],
)
def test_a_prefix_allows_what_lies_below_it_by_whole_parts(prefix: str, url: str, is_allowed: bool) -> None:
    assert AllowedSources.of([prefix]).allows(SourceUrl.parse(url)) is is_allowed


def test_nothing_is_allowed_without_a_prefix() -> None:
    allowed = AllowedSources.of([])
    assert allowed.is_empty
    assert not allowed.allows(SourceUrl.parse("https://host/a"))


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/adapters", "s3://{name}/adapters", "{name}://bucket/a", "https://host/a?n={name}", "hf://{name}",
        "s3://bucket/{name}/{name}", "s3://bucket/{other}/{name}", "file:///{name}", "/folder/{name}",
    ],
)  # fmt: skip
def test_a_template_has_the_name_once_and_below_its_host(text: str) -> None:
    with pytest.raises(InvalidSource):
        SourceTemplate.parse(text)


def test_a_template_allows_what_lies_beside_its_name() -> None:
    allowed = AllowedSources.of([], "s3://bucket/adapters/lora-{name}/final")
    assert allowed.allows(SourceUrl.parse("s3://bucket/adapters/lora-x/final"))
    assert not allowed.allows(SourceUrl.parse("s3://bucket/other"))


@pytest.mark.parametrize(
    "name", ["..", "a/b", "a/../b", "", "a b", "ä", "s3://x", "a?b", "a%2fb", "a\\b", "a" * 129]
)
def test_a_name_never_leads_out_of_its_template(name: str) -> None:
    assert SourceTemplate.parse("https://host/adapters/{name}").of(name) is None


def test_a_name_is_quoted_where_it_would_mean_something() -> None:
    assert str(SourceTemplate.parse("https://host/{name}").of("a:b@c+d")) == "https://host/a%3Ab%40c%2Bd"
    assert str(SourceTemplate.parse("s3://bucket/{name}").of("a@1")) == "s3://bucket/a@1"
    assert SourceTemplate.parse("hf://org/{name}").of("repo@revision") is None
