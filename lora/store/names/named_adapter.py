"""Hold what one adapter name means at this node, and what was found in its folder."""

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lora.adapter import AdapterEntry, AdapterRef, Effect
from lora.errors import AdapterRefused
from lora.format.allowed_roots import AdapterFolder
from lora.format.companions import NO_COMPANIONS, Companions
from lora.format.folder_stamp import FolderStamp
from lora.peers.manifest import Manifest

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class NamedAdapter:
    """What a name means now; `folder` is None where a peer told it. AdapterRegistry locks it.

    `hops` is how far this node is from one that owns the name (0: it does). `misses` counts how often in a row no
    peer has confirmed it. `packing` is held by whoever reads the folder, so that it is read once. `stamp` is the
    folder's when the content was read, `inertia` why that changes no output. `refused` is the folder's stamp when it
    was read and could not be served, and `refusal` the reason: it is not read again until it has changed. `tried` says
    that the content needs no trial any more, and `effect` what the trial told.
    """

    name: str
    folder: AdapterFolder | None
    ref: AdapterRef | None = None
    companions: Companions = NO_COMPANIONS
    hops: int = 0
    misses: int = 0
    stamp: FolderStamp | None = None
    inertia: str | None = None
    refused: FolderStamp | None = None
    refusal: str | None = None
    tried: bool = False
    effect: Effect | None = None
    packing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def told(cls, told: Manifest) -> "NamedAdapter":
        """Make what a peer's name means before it is bound."""
        return cls(told.ref.name, None, companions=told.companions, hops=told.hops)

    def as_alias(self, name: str) -> "NamedAdapter":
        """Make another name's entry of the same folder and findings, before it is bound."""
        return NamedAdapter(
            name, self.folder, companions=self.companions, hops=self.hops, stamp=self.stamp,
            inertia=self.inertia, tried=self.tried, effect=self.effect,
        )  # fmt: skip

    @property
    def path(self) -> Path | None:
        """The path of its folder."""
        return self.folder.path if self.folder else None

    def entry(self) -> AdapterEntry:
        """Return what is told of the name."""
        refusal = self.refusal if self.ref is None else None
        url = self.folder.url if self.folder else ""
        return AdapterEntry(self.name, self.path, self.ref, self.inertia, refusal, self.effect, url)

    def accept(self, stamp: FolderStamp, inertia: str | None) -> None:
        """Remember that the folder is served as it is, and why that changes no output, if so."""
        self.stamp, self.refused, self.refusal, self.inertia = stamp, None, None, inertia
        if inertia:
            _log.warning("adapter %s changes nothing: %s", self.name, inertia)

    def take_effect(self, effect: Effect) -> None:
        """Remember what the content changes; that it is nothing is said once, by its files or by its trial."""
        self.tried, self.effect = True, effect
        if effect == "none" and not self.inertia:
            _log.warning("adapter %s changes nothing: a short prompt gets the base's very logits", self.name)

    def refuse(self, stamp: FolderStamp, refusal: AdapterRefused) -> None:
        """Remember why the folder is not served as it is; nothing is remembered of what may pass."""
        if not refusal.may_pass:
            self.refused, self.refusal = stamp, refusal.reason

    def check(self, stamp: FolderStamp) -> None:
        """Raise AdapterRefused if the folder was refused as it is."""
        if self.refusal is not None and self.refused == stamp:
            raise AdapterRefused(self.name, self.refusal)
