"""Web pages: those of allowed origins may ask and read every answer, others may not."""

from collections.abc import Sequence

import pytest

from engine.api.keys import AccessRules
from tests.engine.api.session import session

PAGE, OTHER = "https://app.example:8443", "https://evil.example"
COMPLETIONS, COMPLETION = "/v1/completions", {"model": "base", "prompt": "hi"}
ALLOW = "Access-Control-Allow-Origin"


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }


async def test_a_preflight_needs_no_key_and_names_what_the_page_may_send() -> None:
    async with session(api_key="key", cors_origins=[PAGE]) as api:
        response = await api.send("OPTIONS", COMPLETIONS, headers=preflight(PAGE))
        assert (response.status, response.body) == (204, b"")
        assert response.headers[ALLOW] == PAGE
        assert response.headers["Access-Control-Allow-Methods"] == "GET, POST"
        assert (
            response.headers["Access-Control-Allow-Headers"]
            == preflight(PAGE)["Access-Control-Request-Headers"]
        )
        assert response.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in response.headers
        assert api.engine.submitted == []


@pytest.mark.parametrize(("origins", "allowed"), [([PAGE], PAGE), (["*"], "*"), ([OTHER, PAGE], PAGE)])
async def test_every_answer_may_be_read_by_an_allowed_page(origins: Sequence[str], allowed: str) -> None:
    async with session(api_key="key", cors_origins=origins) as api:
        headers = {"Origin": PAGE, "Authorization": "Bearer key"}
        whole = await api.post(COMPLETIONS, COMPLETION, headers=headers)
        stream = await api.post(COMPLETIONS, COMPLETION | {"stream": True}, headers=headers)
        bad = await api.post(COMPLETIONS, {}, headers=headers)
        nowhere = await api.send("GET", "/nowhere", headers=headers)
        no_key = await api.post(COMPLETIONS, COMPLETION, headers={"Origin": PAGE})
        answers = (whole, stream, bad, nowhere, no_key)
        assert [answer.status for answer in answers] == [200, 200, 400, 404, 401]
        assert [answer.headers[ALLOW] for answer in answers] == [allowed] * 5
        assert all("X-Request-Id" in answer.headers["Access-Control-Expose-Headers"] for answer in answers)


@pytest.mark.parametrize("origins", [[], [PAGE]])
@pytest.mark.parametrize(
    "origin", [OTHER, "null", "https://app.example", "https://app.example:8443.evil", ""]
)
async def test_other_pages_are_not_allowed(origins: Sequence[str], origin: str) -> None:
    async with session(cors_origins=origins) as api:
        assert ALLOW not in (await api.post(COMPLETIONS, COMPLETION, headers={"Origin": origin})).headers
        refused = await api.send("OPTIONS", COMPLETIONS, headers=preflight(origin))
        assert refused.status == 405
        assert ALLOW not in refused.headers


async def test_a_page_does_not_administer_without_an_admin_key() -> None:
    async with session(cors_origins=["*"]) as api:
        unload = ("/v1/unload_lora_adapter", {"lora_name": "poet"})
        assert (await api.post(*unload, headers={"Origin": PAGE})).status == 403
    async with session(rules=AccessRules([], ["admin"]), cors_origins=["*"]) as api:
        headers = {"Origin": PAGE, "Authorization": "Bearer admin"}
        assert (await api.post(*unload, headers=headers)).status == 200


async def test_what_a_preflight_asks_for_cannot_be_anything_but_names() -> None:
    async with session(cors_origins=[PAGE]) as api:
        asked = preflight(PAGE) | {"Access-Control-Request-Headers": "a: b; <script>"}
        response = await api.send("OPTIONS", COMPLETIONS, headers=asked)
        assert "Access-Control-Allow-Headers" not in response.headers
