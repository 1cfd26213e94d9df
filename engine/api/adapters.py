"""List models as clients see them, and load adapters for clients: from allowed folders only."""

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from engine.api.base import EngineClient
from engine.api.errors import ApiError, refused
from engine.api.schema import LoadAdapter
from engine.errors import InvalidAdapter, NotInTime, UnknownModel
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterEntry
from lora.daemon_threads import CallHangs, DeadlineCalls
from lora.format.adapter_files import WEIGHTS_FILE, short
from lora.format.allowed_roots import AllowedRoots
from lora.format.companions import COMPANION_FILES
from lora.format.peft_config import CONFIG_FILE
from lora.sources.allowed_sources import NOWHERE, AllowedSources
from lora.sources.source_url import AdapterSource, InvalidSource, SourceUrl, is_url, shown_source

_MAX_PATH_CHARS = 4096
_PATH_THREADS = 4
_PATH_S = 30.0  # for the file system to follow a path
_RETRY_AFTER_S = 10
_FILES = (CONFIG_FILE, WEIGHTS_FILE, *COMPANION_FILES)


class AdapterAdmin:
    """Lists models and loads adapters from below `roots`, or from `sources`; without any, clients may load none."""

    def __init__(
        self, client: EngineClient, roots: Sequence[Path], sources: AllowedSources = NOWHERE
    ) -> None:
        self._client, self._sources = client, sources
        self._roots = AllowedRoots.below(roots)
        self._paths = TaskPool("path", _PATH_THREADS)
        self._calls = DeadlineCalls(_PATH_S)

    def models(self, tenant: str = "") -> list[dict[str, object]]:
        """Return OpenAI's model objects, of what a tenant may use: the base by each of its names, then its adapters."""
        accounts = self._client.accounts
        bases = (name for name in self._client.model_names if accounts.may_use(tenant, name))
        adapters = (each for each in self._client.adapters() if accounts.may_use(tenant, each.name))
        return [*map(self._base, bases), *map(self._adapter, adapters)]

    def model(self, name: str, tenant: str = "") -> dict[str, object]:
        """Return one model object. Raises UnknownModel."""
        for model in self.models(tenant):
            if model["id"] == name:
                return model
        raise UnknownModel(name)

    async def load(self, wire: LoadAdapter) -> dict[str, object]:
        """Load an adapter from a folder or a URL; return its model object.

        A name that is there already gets the folder's content, unless `load_inplace` is false. Raises
        ApiError, InvalidAdapterName, AdapterFailed or NotInTime.
        """
        name = wire.lora_name
        if wire.base_model_name is not None and wire.base_model_name not in self._client.model_names:
            message = f"give {self._client.model_name!r}, or leave the field out"
            raise refused("base_model_name", message, "invalid_value")
        folder = await self._source(wire.lora_path)
        try:
            replaces = wire.load_inplace is not False
            ref = await self._client.load_adapter(name, folder, replaces, self._roots)
        except InvalidAdapter as error:
            raise refused("lora_path", str(error), "invalid_adapter") from error
        is_path = isinstance(folder, Path)
        url = "" if is_path else folder.text
        loaded = AdapterEntry(name, folder if is_path else None, ref, url=url)  # whatever it has become since
        known = (entry for entry in self._client.adapters() if (entry.name, entry.ref) == (name, ref))
        return self._adapter(next(known, loaded))

    def source(self, name: str, folder: str) -> str:
        """Tell clients where an adapter comes from: a URL without secrets, a folder below a root, else its name."""
        if is_url(folder):
            return shown_source(folder)
        root = self._roots.root_of(Path(folder)) if folder else None
        return str(Path(folder).relative_to(root)) if root is not None else name

    def _base(self, name: str) -> dict[str, object]:
        root = Path(self._client.model_root)
        return self._object(name, root.name if root.is_absolute() else str(root), None)

    def _adapter(self, adapter: AdapterEntry) -> dict[str, object]:
        return self._object(adapter.name, self._root_of(adapter), self._client.model_name) | {
            "changes_output": None if adapter.inertia is None else not adapter.inertia,
            "effect": adapter.effect,
            "error": adapter.refusal,
            "invocation": None if adapter.ref is None else list(adapter.ref.invocation),
        }

    def _root_of(self, adapter: AdapterEntry) -> str:
        """Return an adapter's folder from below an allowed root, else its name: no path of this machine."""
        return self.source(adapter.name, adapter.source)

    def _object(self, name: str, root: str, parent: str | None) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._client.created_s,
            "owned_by": "loraserve",
            "root": root,
            "parent": parent,
            "max_model_len": self._client.max_model_len,
        }

    async def _source(self, given: str) -> AdapterSource:
        """Read what a client gives. Raises ApiError for what is not allowed."""
        if not is_url(given):
            return await self._paths.run(lambda: self._followed(given))
        if self._sources.is_empty:
            message = "lora_path: loading by URL is off: start the server with --lora-source"
            raise ApiError(HTTPStatus.FORBIDDEN, message, "lora_path", "loading_is_off")
        try:
            url = SourceUrl.parse(given)
        except InvalidSource as error:
            raise refused("lora_path", str(error), "invalid_value") from None
        if not self._sources.allows(url):
            message = f"lora_path: {short(url.shown)} is outside of what this server may fetch from"
            raise ApiError(HTTPStatus.FORBIDDEN, message, "lora_path", "outside_sources")
        return url

    def _followed(self, path: str) -> Path:
        """Return the folder that `path` names, unless it is not allowed or its file system does not answer."""
        try:
            return self._calls.run(short(path), lambda: self._allowed(path))
        except CallHangs as error:
            raise NotInTime(str(error), _RETRY_AFTER_S) from error

    def _allowed(self, path: str) -> Path:
        """Resolve the folder that `path` names, links followed, if it lies below a root.

        What exists outside of the roots is not disclosed. Who reads the files judges again what it opens.
        """
        if not self._roots.paths:
            message = "lora_path: loading by path is off: start the server with --lora-root or --lora-dir"
            raise ApiError(HTTPStatus.FORBIDDEN, message, "lora_path", "loading_is_off")
        if not path.isprintable() or not 0 < len(path) <= _MAX_PATH_CHARS:
            raise refused("lora_path", f"give 1 to {_MAX_PATH_CHARS} printable characters", "invalid_value")
        try:
            inside = [
                folder for root in self._roots.paths if self._is_inside(folder := (root / path).resolve())
            ]
            existing = [folder for folder in inside if folder.is_dir()]
            files_inside = not existing or all(self._is_inside(existing[0] / file) for file in _FILES)
        except (OSError, RuntimeError) as error:  # a name that is too long, links that lead to themselves
            message = f"{short(path)} cannot be followed: give the path of a PEFT adapter's folder"
            raise refused("lora_path", message, "invalid_value") from error
        if not inside or not files_inside:
            message = f"lora_path: {short(path)} is outside the folders that this server may load from"
            raise ApiError(HTTPStatus.FORBIDDEN, message, "lora_path", "outside_roots")
        if not existing:
            raise refused("lora_path", f"{short(path)} is no folder: give a PEFT adapter's", "not_a_folder")
        return existing[0]

    def _is_inside(self, file: Path) -> bool:
        """Tell whether a file, or what it links to, lies below a root."""
        return self._roots.root_of(file.resolve()) is not None
