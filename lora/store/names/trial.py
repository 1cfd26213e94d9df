"""Try an adapter's content by computing with it, before its name is served. How that is computed is the engine's."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from lora.adapter import AdapterRef, Effect
from lora.errors import AdapterRefused
from lora.format.allowed_roots import AdapterFolder
from lora.format.packed import PackedLayout
from lora.store.contents import Contents
from lora.store.names.named_adapter import NamedAdapter

_log = logging.getLogger(__name__)


class AdapterTrial(Protocol):
    """Computes with a known content, in any thread and for a bounded time."""

    def __call__(self, ref: AdapterRef, waits: bool) -> Effect | None:
        """Return what the adapter changes; None if requests wait already, unless the caller `waits` with them.

        Raises AdapterRefused for one that cannot be served, UnknownAdapter for a content that is gone.
        """
        ...


class ContentTrials:
    """Tries contents for the registry. Without a trial of the engine's, all are as good as tried."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._trial: AdapterTrial | None = None

    def use(self, trial: AdapterTrial) -> None:
        """Have contents tried from now on."""
        self._trial = trial

    @property
    def are_made(self) -> bool:
        """Tell whether contents are tried at all."""
        return self._trial is not None

    @contextmanager
    def known(
        self, ref: AdapterRef, layout: PackedLayout, name: str, folder: AdapterFolder | None
    ) -> Generator[None]:
        """Know a content, as if a name meant it, while it is tried and before one does."""
        self._contents.bind(ref, layout, name, folder)
        try:
            yield
        finally:
            self._contents.unbind(ref.digest)
            self._contents.advance()

    def run(self, entry: NamedAdapter, ref: AdapterRef, waits: bool) -> None:
        """Try a known content, and tell `entry` what came of it. Raises as AdapterTrial."""
        if self._trial is None:
            return
        try:
            effect = self._trial(ref, waits)
        except AdapterRefused as refusal:
            if entry.stamp is not None:
                entry.refuse(entry.stamp, refusal)
            _log.warning("%s", refusal)
            raise
        if effect is not None:
            entry.take_effect(effect)
