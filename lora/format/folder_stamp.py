"""Tell an adapter's folder from what it was before, without reading its files.

Two stamps are equal as long as its files are the same, unchanged. Links are followed, so that one which comes to lead
elsewhere changes the stamp.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.companions import COMPANION_FILES
from lora.format.peft_config import CONFIG_FILE

_ABSENT = ("absent",)
_UNREADABLE = "unreadable"
FileState = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class FolderStamp:
    """What a folder's files were like at one moment: which file each is, its size, and when it was changed.

    `companions` are the files beside configuration and weights.
    """

    config: FileState
    weights: FileState
    companions: tuple[FileState, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Tell whether the folder was an adapter's, if perhaps a broken one."""
        return self.config != _ABSENT

    @property
    def is_whole(self) -> bool:
        """Tell whether both files were there and could be looked at."""
        return isinstance(self.config[0], int) and isinstance(self.weights[0], int)

    @property
    def is_unreadable(self) -> bool:
        """Tell whether a file could not be looked at, so that nothing is known of it."""
        return _UNREADABLE in (self.config[0], self.weights[0])


def folder_stamp(folder: Path) -> FolderStamp:
    """Look at the files of a folder; it may wait for a network's folder."""
    at = os.fspath(folder)  # text: as objects, the paths of thousands of folders take three times as long
    companions = tuple(_state(at, file) for file in COMPANION_FILES)
    return FolderStamp(_state(at, CONFIG_FILE), _state(at, WEIGHTS_FILE), companions)


def _state(folder: str, file: str) -> FileState:
    try:
        found = os.stat(f"{folder}/{file}")  # noqa: PTH116 - see above
    except (FileNotFoundError, NotADirectoryError):
        return _ABSENT
    except OSError as error:
        return (_UNREADABLE, error.errno or 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
