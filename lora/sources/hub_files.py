"""Read adapters' files from the Hugging Face hub.

huggingface_hub says where a file is and what it is; its token comes from the environment. The bytes are read over HTTP.
"""

import importlib
import os
from typing import Any
from urllib.parse import urlsplit

from lora.format.adapter_files import Flaw, PassingFlaw
from lora.sources.base import HeldFile, SourceForbidden
from lora.sources.http_files import HttpFile, open_http
from lora.sources.source_url import SourceUrl

_ASK_S = 20.0
_DEFAULT_ENDPOINT = "https://huggingface.co"
_ABSENT = (
    "EntryNotFoundError",
    "RemoteEntryNotFoundError",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
)


class HubFile:
    """An OpenedFile of the hub, whose version is the hub's own."""

    def __init__(self, file: HttpFile, version: str, size: int | None) -> None:
        self._file, self.version = file, version
        self.start, self.size = file.start, size if size is not None else file.size
        self.read, self.close = file.read, file.close


class HubFiles:
    """SourceFiles of hf://. It holds nothing, so any number of threads may call it."""

    def open(self, url: SourceUrl, file: str, held: HeldFile) -> HubFile | None:
        """As SourceFiles.open."""
        hub = _hub()
        endpoint = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
        where = hub.hf_hub_url(
            "/".join(url.segments), file, revision=url.revision or None, endpoint=endpoint.rstrip("/")
        )
        told = _told(hub, where, file)
        version, size = str(told.etag or ""), told.size
        if held.is_whole and version and version == held.version:
            return None
        location = str(told.location or where)
        is_own = urlsplit(location).netloc == urlsplit(endpoint).netloc
        token = hub.get_token() if is_own else None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A range needs no condition: the location is of this version.
        at = held.nbytes if version and version == held.version and not held.is_whole else 0
        if at:
            headers["Range"] = f"bytes={at}-"
        opened = open_http(location, HeldFile("", at), lambda target: _same_host(target, location), headers)
        return None if opened is None else HubFile(opened, version, size)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise Flaw("hf:// needs the package huggingface_hub: pip install huggingface-hub") from None


def _told(hub: Any, where: str, file: str) -> Any:
    """Ask the hub for a file's etag, size and location."""
    try:
        return hub.get_hf_file_metadata(where, timeout=_ASK_S)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if "GatedRepoError" in kinds:
            remedy = "ask for access on the hub, and set HF_TOKEN in this server's environment"
            raise SourceForbidden(f"its repository is gated: {remedy}") from None
        answer = getattr(error, "response", None)
        if any(kind in kinds for kind in _ABSENT) or getattr(answer, "status_code", None) == 404:
            raise FileNotFoundError(file) from None
        raise PassingFlaw(f"the hub cannot be asked now ({type(error).__name__}): try again") from error


def _same_host(target: str, location: str) -> bool:
    found, expected = urlsplit(target), urlsplit(location)
    return (found.scheme, found.netloc) == (expected.scheme, expected.netloc)
