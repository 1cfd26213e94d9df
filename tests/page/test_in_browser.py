"""The live page as people use it: by eye, by keyboard, on a phone, with a key, and with names that mean harm."""

import pytest

from engine.api.keys import AccessRules
from tests.page.browser import needs_browser, open_page
from tests.page.simulated_cluster import SimulatedCluster

pytestmark = [needs_browser, pytest.mark.slow]
LIVE = "document.getElementById('state').dataset.state === 'live'"
HOSTILE = (
    "<img src=x onerror=window.harmed=1>",
    "<script>window.harmed=1</script>",
    "a'\"><svg onload=window.harmed=1>",
    "javascript:window.harmed=1",
    "__proto__",
    "constructor",
    "a\u2028b\u202egnp.exe",
    "{{7*7}}${7*7}",
    "%2e%2e/x?y#z&amp;",
)


async def test_the_page_shows_the_cluster_and_follows_a_kill() -> None:
    cluster = SimulatedCluster(4, 200)
    cluster.pass_time(1, 100)
    cluster.nodes.reverse()
    async with open_page(cluster) as page:
        await page.until(LIVE)
        await page.until("document.querySelectorAll('#nodes tbody tr').length === 4")
        assert "4 of 4" in await page.text("#summary")
        names = await page.tab.locator("#nodes tbody th").all_inner_texts()
        assert names == ["node-0", "node-1", "node-2", "node-3"]
        ranks = await page.tab.locator("#latency tbody th").all_inner_texts()
        assert set(ranks) <= {"8", "16", "32", "64", "128"}
        assert ranks == sorted(ranks, key=int)
        cluster.kill("node-1")
        await page.until("document.querySelectorAll('#nodes tbody tr').length === 3")
        assert "a node left" in await page.text("#placements")
        assert "to node-" in await page.text("#pulls")
        await page.until("document.querySelector('#counters').textContent.includes('moved')")
        assert page.complaints == []


async def test_the_map_is_used_by_keyboard_and_speaks() -> None:
    async with open_page(SimulatedCluster(4, 50)) as page:
        await page.until(LIVE)
        await page.until("document.querySelector('[role=grid]').getAttribute('aria-colcount') === '50'")
        await page.tab.locator("[role=grid]").focus()
        for key in ("ArrowRight", "ArrowDown", "End"):
            await page.tab.keyboard.press(key)
        spoken = await page.tab.locator("#heat-cell").text_content()
        assert spoken.startswith("tenant-00049/style, rank 128, node-1:")
        assert await page.tab.locator("[role=grid]").get_attribute("aria-activedescendant") == "heat-cell"
        await page.tab.keyboard.press("Enter")
        await page.until("!document.getElementById('adapter').hidden")
        assert await page.text("#adapter-title") == "tenant-00049/style"
        assert page.complaints == []


async def test_names_are_data_wherever_they_are_shown() -> None:
    cluster = SimulatedCluster(2, 3, HOSTILE)
    cluster.kill("node-1")
    async with open_page(cluster) as page:
        await page.until(LIVE)
        for name in HOSTILE:
            await page.tab.evaluate(
                "name => { location.hash = '#/adapter/' + encodeURIComponent(name) }", name
            )
            await page.until("!document.getElementById('adapter').hidden")
            await page.until("name => document.getElementById('adapter-title')?.textContent === name", name)
            assert await page.tab.locator("#adapter .facts").count() == 1, name
        await page.tab.evaluate("() => { location.hash = '#/' }")
        await page.until("!document.getElementById('overview').hidden")
        assert await page.tab.evaluate("window.harmed") is None
        assert (
            await page.tab.evaluate("document.querySelectorAll('main img, main svg, main script').length")
            == 0
        )
        assert page.complaints == []


async def test_an_answer_streams_into_the_page() -> None:
    cluster = SimulatedCluster(2, 5)
    async with open_page(cluster, "/#/adapter/tenant-00002%2Fstyle") as page:
        await page.until(LIVE)
        assert await page.tab.input_value("#ask-model") == "tenant-00002/style"
        await page.tab.fill("#ask-prompt", "hello")
        await page.tab.press("#ask-prompt", "Tab")
        await page.tab.keyboard.press("Enter")
        await page.until("document.querySelector('.answer').textContent.includes('tenant-00002/style heard')")
        await page.until("document.querySelector('#ask .note').textContent.includes('first text after')")
        await page.tab.fill("#ask-model", "nobody")
        await page.tab.click("#ask button[type=submit]")
        await page.until("document.querySelector('#ask .note').textContent.includes('nobody')")


async def test_the_key_is_asked_for_and_kept_by_the_tab_only() -> None:
    async with open_page(SimulatedCluster(2, 5), rules=AccessRules(["ask"], ["admin"])) as page:
        await page.until("!document.getElementById('key-form').hidden")
        await page.tab.fill("#key", "ask")
        await page.tab.press("#key", "Enter")
        await page.until("document.getElementById('state').dataset.state === 'forbidden'")
        assert "admin" in await page.text("#key-reason")
        await page.tab.fill("#key", "admin")
        await page.tab.press("#key", "Enter")
        await page.until(LIVE)
        kept = await page.tab.evaluate("[sessionStorage.length, localStorage.length, document.cookie]")
        assert kept == [1, 0, ""]


async def test_ten_thousand_adapters_are_scrolled_through_without_drawing_them_all() -> None:
    async with open_page(SimulatedCluster(4, 10_000)) as page:
        await page.until("document.querySelector('[role=grid]')?.getAttribute('aria-colcount') === '10000'")
        drawn = await page.tab.evaluate("""async () => {
            const grid = document.querySelector('[role=grid]');
            const context = document.querySelector('canvas').getContext('2d');
            const fill = context.fillRect.bind(context);
            let drawn = 0;
            context.fillRect = (...box) => { drawn += 1; fill(...box); };
            let frames = 0;
            for (let at = 0; at < 20; at += 1) {
              grid.scrollLeft += 2000;
              await new Promise(requestAnimationFrame);
              await new Promise(requestAnimationFrame);
              frames += 1;
            }
            return [drawn / frames, document.querySelectorAll('*').length];
        }""")
        assert 0 < drawn[0] < 4 * 400
        assert drawn[1] < 1500, "no element for each adapter"
        assert page.complaints == []


async def test_a_phone_shows_everything_in_one_column() -> None:
    cluster = SimulatedCluster(4, 200)
    cluster.pass_time(1, 200)
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    async with open_page(cluster, **phone, color_scheme="dark") as page:
        await page.until(LIVE)
        await page.until("document.querySelectorAll('#nodes tbody tr').length === 4")
        assert await page.tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.complaints == []
