"""Two kinds of key: one asks, one administers as well; without an admin key only this machine administers."""

from pathlib import Path

import pytest

from engine.api.errors import ApiError
from engine.api.keys import AccessRules, KeylessAdmin, Permission
from engine.config.access_config import key_name
from tests.engine.api.session import session

LOAD, UNLOAD, COMPLETIONS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
COMPLETION = {"model": "base", "prompt": "hi"}
BOTH = AccessRules(["ask1", "ask2"], ["admin1", "admin2"])


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


def status(rules: AccessRules, need: Permission, key: str | None, is_local: bool = True) -> int:
    """What the client of a key is answered; 200 where it is let in."""
    try:
        rules.admit(need, None if key is None else f"Bearer {key}", is_local)
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("key", ["ask1", "ask2", "admin1", "admin2"])
async def test_every_key_of_either_kind_may_ask(key: str) -> None:
    async with session(rules=BOTH) as api:
        assert (await api.post(COMPLETIONS, COMPLETION, headers=bearer(key))).status == 200
        assert (await api.send("GET", "/metrics", headers=bearer(key))).status == 200


@pytest.mark.parametrize(
    ("headers", "expected", "code"),
    [
        ({}, 401, "invalid_api_key"),
        (bearer("nobody"), 401, "invalid_api_key"),
        (bearer("ask1"), 403, "admin_key_required"),
        (bearer("ask2") | {"X-Forwarded-For": "127.0.0.1"}, 403, "admin_key_required"),
    ],
)
async def test_an_api_key_never_administers_beside_an_admin_key(
    headers: dict[str, str], expected: int, code: str, tmp_path: Path
) -> None:
    async with session(rules=BOTH, roots=[tmp_path]) as api:
        for path, body in (
            (LOAD, {"lora_name": "x", "lora_path": "y"}),
            (UNLOAD, {"lora_name": "poet"}),
            (UNLOAD, {}),
            ("/v1/unload%5Flora_adapter", {"lora_name": "poet"}),
        ):
            response = await api.post(path, body, headers=headers)
            assert (response.status, response.error["code"]) == (expected, code)
            assert ("WWW-Authenticate" in response.headers) == (expected == 401)
        assert [adapter.name for adapter in api.engine.adapters()] == ["poet", "team/coder"]


@pytest.mark.parametrize("headers", [bearer("admin1"), bearer("admin2") | {"Via": "1.1 proxy"}])
async def test_an_admin_key_administers_from_anywhere(headers: dict[str, str]) -> None:
    async with session(rules=AccessRules(["ask"], ["admin1", "admin2"], "nobody")) as api:
        assert (await api.post(UNLOAD, {"lora_name": "poet"}, headers=headers)).status == 200


async def test_requests_are_those_of_the_tenant_that_the_key_names() -> None:
    async with session(rules=AccessRules(["ask1", "ask2"], [])) as api:
        for key in ("ask1", "ask2", "ask1"):
            assert (await api.post(COMPLETIONS, COMPLETION, headers=bearer(key))).status == 200
        assert api.engine.tenants == [key_name(key) for key in ("ask1", "ask2", "ask1")]


async def test_without_api_keys_everybody_asks_and_only_admin_keys_administer() -> None:
    async with session(rules=AccessRules([], ["admin"])) as api:
        assert (await api.post(COMPLETIONS, COMPLETION)).status == 200
        assert (await api.post(COMPLETIONS, COMPLETION, headers=bearer("none"))).status == 200
        assert (await api.post(UNLOAD, {"lora_name": "poet"}, headers=bearer("none"))).status == 401
        assert (await api.post(UNLOAD, {"lora_name": "poet"}, headers=bearer("admin"))).status == 200


@pytest.mark.parametrize(
    ("keyless_admin", "is_local", "expected"),
    [
        ("local", True, 200),
        ("local", False, 403),
        ("nobody", True, 403),
        ("everybody", False, 200),
    ],
)
@pytest.mark.parametrize("keys", [[], ["ask"]])
def test_without_an_admin_key_it_depends_on_where_the_client_is(
    keyless_admin: KeylessAdmin, is_local: bool, expected: int, keys: list[str]
) -> None:
    rules = AccessRules(keys, [], keyless_admin)
    assert status(rules, Permission.ADMINISTER, "ask", is_local) == expected
    assert status(rules, Permission.ADMINISTER, None, is_local) == (401 if keys else expected)


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Origin", "x-forwarded-for"]
)
async def test_what_came_through_a_proxy_or_a_web_page_is_not_local(header: str) -> None:
    async with session() as api:
        relayed = {header: "127.0.0.1"}
        response = await api.post(UNLOAD, {"lora_name": "poet"}, headers=relayed)
        assert (response.status, response.error["code"]) == (403, "admin_is_off")
        assert "--admin-key-file" in response.error["message"]
        assert "--allow-admin-without-key" in response.error["message"]
        assert (await api.post(UNLOAD, {"lora_name": "poet"})).status == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "BeArEr"])
async def test_the_scheme_s_case_does_not_matter(scheme: str) -> None:
    async with session(rules=BOTH) as api:
        assert (await api.send("GET", "/v1/models", headers=bearer("ask2", scheme))).status == 200
        assert (await api.send("GET", "/v1/models", headers=bearer(" ask2", scheme))).status == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic ask1", "ask1", "Bearerask1", "Bearer ask1 x", "Bearer ASK1", "Bearer é"],
)
async def test_nothing_but_a_key_after_the_scheme_is_a_key(header: str) -> None:
    async with session(rules=BOTH) as api:
        assert (await api.send("GET", "/v1/models", headers={"Authorization": header})).status == 401


async def test_metrics_can_be_left_open_alone() -> None:
    async with session(rules=AccessRules(["ask"], [], open_metrics=True)) as api:
        assert (await api.send("GET", "/metrics")).status == 200
        assert (await api.send("GET", "/v1/models")).status == 401


def test_a_key_s_name_tells_keys_apart_and_is_not_the_key() -> None:
    names = {
        BOTH.admit(Permission.ASK, f"Bearer {key}", False).key for key in ("ask1", "ask2", "admin1", "admin2")
    }
    assert len(names) == 4
    assert all(len(name) == 8 and int(name, 16) >= 0 for name in names)
    assert BOTH.admit(Permission.NOTHING, None, False).key == ""
