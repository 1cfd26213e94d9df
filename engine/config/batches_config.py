"""Hold what an operator may choose of the files and batches that clients keep at a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from engine.config.option import Option, check_fields
from engine.config.option_types import COUNT, DIRECTORY, SIZE


@dataclass(frozen=True, slots=True)
class BatchesConfig:
    """Files and batches over HTTP. Off without a folder."""

    batch_dir: Annotated[
        Path | None,
        Option(
            "files and batches",
            DIRECTORY,
            "folder for clients' files and batches, made where there is none",
            note="none: no /v1/files and /v1/batches",
        ),
    ] = None
    batch_file_bytes: Annotated[int, Option("files and batches", SIZE, "most bytes of a file")] = 200 << 20
    batch_dir_bytes: Annotated[
        int, Option("files and batches", SIZE, "most bytes of all files; beyond, none is taken")
    ] = 10 << 30
    batch_in_flight: Annotated[
        int,
        Option("files and batches", COUNT, "lines of all batches that run at once, behind other requests"),
    ] = 16

    def __post_init__(self) -> None:
        check_fields(self)
