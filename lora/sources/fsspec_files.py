"""Read adapters' files from what fsspec has an implementation of: S3, Google Cloud Storage and others.

Credentials are the library's business, which finds them in the environment. What it says of an error may hold them, so
only the error's kind is told.
"""

import importlib
import logging
from typing import Any

from lora.format.adapter_files import Flaw, PassingFlaw
from lora.sources.base import HeldFile, SourceForbidden
from lora.sources.source_url import SourceUrl

_BLOCK_BYTES = 4 << 20
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LOCAL = ("local", "memory", "dir", "data", "ftp", "http", "https", "file", "hf")  # not by this door
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated", "mtime", "last_modified")
_log = logging.getLogger(__name__)


class FsspecFile:
    """An OpenedFile of a file system of fsspec."""

    def __init__(self, handle: Any, start: int, size: int, version: str) -> None:
        """Read `handle`, which stands at `start`."""
        self._handle, self.start, self.size, self.version = handle, start, size, version

    def read(self, most: int) -> bytes:
        """As OpenedFile.read."""
        try:
            return self._handle.read(most)
        except Exception as error:
            raise ConnectionError(type(error).__name__) from error

    def close(self) -> None:
        """As OpenedFile.close."""
        self._handle.close()


class FsspecFiles:
    """SourceFiles of every scheme that fsspec knows. Its file systems are kept, which any thread may use."""

    def __init__(self) -> None:
        self._systems: dict[str, Any] = {}

    def open(self, url: SourceUrl, file: str, held: HeldFile) -> FsspecFile | None:
        """As SourceFiles.open."""
        system, path = self._system(url.scheme), url.of_file(file).text
        try:
            info: dict[str, Any] = system.info(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(file) from None
        except PermissionError:
            told = "check its name, and the credentials in this server's environment"
            raise SourceForbidden(f"{file} may not be read there: {told}") from None
        except Exception as error:
            raise _passing(error) from error
        if info.get("type") != "file" or not isinstance(info.get("size"), int):
            raise FileNotFoundError(file)
        found = (f"{info[key]}" for key in _VERSION_KEYS if info.get(key))
        version, size = next(found, ""), int(info["size"])
        is_same = bool(version) and version == held.version
        if held.is_whole and is_same and held.nbytes == size:
            return None
        start = held.nbytes if is_same and not held.is_whole and held.nbytes <= size else 0
        try:
            handle = system.open(path, "rb", block_size=_BLOCK_BYTES)
            handle.seek(start)
        except Exception as error:
            raise _passing(error) from error
        return FsspecFile(handle, start, size, version)

    def _system(self, scheme: str) -> Any:
        if scheme not in self._systems:
            self._systems[scheme] = _file_system(scheme)
        return self._systems[scheme]


def _file_system(scheme: str) -> Any:
    """Make the file system of a scheme. Raises Flaw with the command that installs what it lacks."""
    if scheme in _LOCAL:
        raise Flaw(f"adapters are not fetched by {scheme}://: give s3://, gs://, https://, hf:// or file:///")
    package = _PACKAGES.get(scheme)
    try:
        fsspec: Any = importlib.import_module("fsspec")
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise Flaw(
            f"{scheme}:// needs {f'the package {package}' if package else 'a package that is not here'}:"
            f" pip install {package or 'what fsspec names for it'}, and start the server again"
        ) from None
    except ValueError:
        known = "s3://, gs://, https://, hf:// or file:///"
        raise Flaw(f"{scheme}:// is nothing that adapters can be fetched by: give {known}") from None
    except Exception as error:
        raise _passing(error) from error


def _passing(error: Exception) -> PassingFlaw:
    _log.debug("a source failed", exc_info=error)
    told = "check it and the credentials in this server's environment, or try again"
    return PassingFlaw(f"its store cannot be read now ({type(error).__name__}): {told}")
