"""A file of tenants is read wholly, or refused with the table, the field, the value and the remedy."""

import os
import re
from hashlib import sha256
from pathlib import Path

import pytest

from engine.config.access_config import key_name
from engine.config.command_line import serve_config
from engine.errors import InvalidConfig
from engine.tenants.tenant import TenantLimits
from engine.tenants.tenants_file import TenantsFlaw, read_tenants

ACME = sha256(b"acme-key").hexdigest()
WHOLE = f"""
[tenants.acme]
key_digests = ["{ACME}"]
key_file = "acme.keys"
adapters = ["acme-*", "shared"]
base = false
requests_per_minute = 600
tokens_per_minute = 100_000
concurrent = 16
weight = 2
priority = -1

[tenants.acme.limits."acme-big-*"]
tokens_per_minute = 20_000

[tenants.guests]
key_file = "guests.keys"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "acme.keys").write_text("\ufeffone\n\n two \r\n")
    (tmp_path / "guests.keys").write_text("three")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "tenants.toml"
    file.write_text(text)
    return file


def test_everything_that_a_table_may_say_is_taken(folder: Path) -> None:
    acme, guests = read_tenants(written(folder, WHOLE))
    assert acme.key_digests == {ACME, sha256(b"one").hexdigest(), sha256(b"two").hexdigest()}
    assert (acme.limits, acme.weight, acme.priority) == (TenantLimits(600, 100_000, 16), 2.0, -1)
    assert acme.limits_of("acme-big-1") == TenantLimits(tokens_per_minute=20_000)
    assert acme.limits_of("acme-small") == TenantLimits()
    assert [acme.may_use(*each) for each in (("acme-x", False), ("shared", False), ("x", False))] == [
        True,
        True,
        False,
    ]
    assert not acme.may_use("base", True)
    assert (guests.name, guests.limits, guests.weight, guests.priority) == ("guests", TenantLimits(), 1.0, 0)
    assert guests.may_use("base", True)
    assert guests.may_use("anything", False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it has no tenant"),
        ("tenants = 3", "it has no tenant"),
        ("[acme]", "unknown key 'acme'"),
        ("[tenants.acme", "it is no TOML"),
        ("[tenants]\nacme = 3", "tenants.acme is 3: write a table [tenants.acme]"),
        ("[tenants.acme]", "[tenants.acme] has no key"),
        ('[tenants."a b"]', "name it by at most 64 letters"),
        ("[tenants.0123abcd]", "keys without a tenant have such names"),
        ("[tenants.acme]\ntokens_per_minut = 3", "'tokens_per_minut': did you mean tokens_per_minute?"),
        ("[tenants.acme]\nkey = 'x'", "'key'"),
        ("[tenants.acme]\nrequests_per_minute = 0", "requests_per_minute = 0 is not accepted: give a whole"),
        ("[tenants.acme]\nrequests_per_minute = 1.5", "requests_per_minute = 1.5"),
        ("[tenants.acme]\nconcurrent = true", "concurrent = True"),
        ("[tenants.acme]\nconcurrent = '3'", "concurrent = '3'"),
        ("[tenants.acme]\nweight = nan", "weight = nan"),
        ("[tenants.acme]\nweight = 0", "give a number from 0.001 to 1000"),
        ("[tenants.acme]\npriority = 101", "priority = 101"),
        ("[tenants.acme]\nbase = 1", "give true or false"),
        ("[tenants.acme]\nadapters = 'acme-*'", "give a list of patterns"),
        ("[tenants.acme]\nadapters = ['']", "adapters = ['']"),
        (f"[tenants.acme]\nkey_digests = ['{ACME[:8]}']", "SHA-256 digests in 64 lower-case"),
        ("[tenants.acme]\nkey_file = ''", "give a file's path"),
        ("[tenants.acme]\nkey_file = 'none.keys'", "key_file = 'none.keys' cannot be used"),
        ("[tenants.acme]\nkey_file = '.'", "key_file = '.' cannot be used"),
        ("[tenants.acme]\nkey_file = 'pipe'", "key_file = 'pipe' cannot be used"),
        ("[tenants.acme]\nlimits = 3", "limits = 3"),
        ("[tenants.acme.limits]\nx = 3", "[tenants.acme.limits.'x'] is 3"),
        ("[tenants.acme.limits.x]\nconcurrent = -1", "[tenants.acme.limits.'x'] concurrent = -1"),
        ("[tenants.acme.limits.x]\nweight = 1", "unknown field 'weight'"),
        (
            "[tenants.a]\nkey_file='acme.keys'\n[tenants.b]\nkey_file='acme.keys'",
            "[tenants.a] and [tenants.b]",
        ),
    ],
)
def test_what_is_wrong_is_told_by_its_place(text: str, told: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    if text.startswith("[tenants.acme.limits"):
        text = f"[tenants.acme]\nkey_file = 'acme.keys'\n{text}"
    elif "=" in text and "key" not in text:
        text = text.replace("[tenants.acme]\n", "[tenants.acme]\nkey_file = 'acme.keys'\n")
    with pytest.raises(TenantsFlaw) as flaw:
        read_tenants(written(folder, text))
    assert told in str(flaw.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"two words", b"a,b", b"\xff\xfe", "é".encode()])
def test_a_file_without_a_usable_key_is_refused_and_not_shown(content: bytes, folder: Path) -> None:
    (folder / "bad.keys").write_bytes(content)
    with pytest.raises(TenantsFlaw) as flaw:
        read_tenants(written(folder, "[tenants.acme]\nkey_file = 'bad.keys'"))
    assert "words" not in str(flaw.value).replace("key_file", "")


def test_the_server_checks_the_file_at_its_start(folder: Path) -> None:
    good = str(written(folder, WHOLE.replace("weight = 2", "")))
    assert [each.name for each in serve_config(["--tenants", good], {}).tenants.read()] == ["acme", "guests"]
    weights = ["--nodes", "2", "--api-key", "sesame", "--tenant-weight", f"{key_name('sesame')}=2"]
    for arguments, field, told in (
        (["--admin-key", "acme-key"], "tenants", "has the admin key"),
        (weights, "tenant_weight", "write `weight` in their tables"),
    ):
        with pytest.raises(InvalidConfig, match=told) as refusal:
            serve_config([*arguments, "--tenants", good], {})
        assert refusal.value.field == field
        assert "acme-key" not in str(refusal.value)
    bad = str(written(folder, "[tenants.acme]\nweight = -1"))
    with pytest.raises(InvalidConfig, match=r"tenants=.*\[tenants.acme\] weight = -1 is not accepted"):
        serve_config(["--tenants", bad], {})


def test_the_page_s_example_is_one(folder: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tenants.md").read_text()
    (example,) = re.findall(r"^```toml\n(.+?)^```", page, re.MULTILINE | re.DOTALL)
    acme, guests = read_tenants(written(folder, example))
    assert (acme.limits, acme.base, guests.limits.requests_per_minute) == (
        TenantLimits(600, 100_000, 32),
        False,
        60,
    )
    assert acme.limits_of("acme-big-1").tokens_per_minute == 20_000


def test_a_weight_counts_with_a_cluster_and_without(folder: Path) -> None:
    file = str(written(folder, WHOLE))
    for arguments in (["--nodes", "2"], []):
        assert serve_config([*arguments, "--tenants", file], {}).tenants.read()[0].weight == 2
