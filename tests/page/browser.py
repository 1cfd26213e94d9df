"""A server over a simulated cluster, and a browser's page on it. Whatever the browser complains of fails the test."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.api.keys import AccessRules
from tests.engine.api.session import ApiSession, session
from tests.page.simulated_cluster import SimulatedCluster

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (extra `page`)")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this machine")
_TRIES, _PAUSE_S = 600, 0.1


@dataclass(frozen=True, slots=True)
class OpenPage:
    """A browser's tab on the live page; `complaints` are errors of scripts and of the security policy."""

    tab: Any
    api: ApiSession
    complaints: list[str] = field(default_factory=list[str])

    async def text(self, selector: str) -> str:
        """The text of an element."""
        return await self.tab.locator(selector).inner_text()

    async def until(self, condition: str, argument: object = None) -> None:
        """Wait until an expression in the page is true, or a function of `argument` is.

        It is asked for again and again: what playwright waits with is forbidden by the page's policy.
        """
        for _ in range(_TRIES):
            if await self.tab.evaluate(condition, argument):
                return
            await asyncio.sleep(_PAUSE_S)
        raise AssertionError(f"it did not come true: {condition}; {self.complaints}")


@asynccontextmanager
async def open_page(
    cluster: SimulatedCluster, path: str = "/", rules: AccessRules | None = None, **context: Any
) -> AsyncIterator[OpenPage]:
    """Open the page at `path`; `context` is the browser's: its size, its colours."""
    async with session(cluster.engine, rules=rules) as api, playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = await (await browser.new_context(**context)).new_page()
            opened = OpenPage(tab, api)
            tab.on("pageerror", lambda error: opened.complaints.append(str(error)))
            tab.on("console", lambda line: line.type == "error" and opened.complaints.append(line.text))
            await tab.goto(str(api.http._base_url).rstrip("/") + path)
            yield opened
        finally:
            await browser.close()
