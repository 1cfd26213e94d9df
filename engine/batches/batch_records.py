"""Define OpenAI's file and batch objects, as clients get them and as they are kept."""

from typing import Literal

import msgspec

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
UNFINISHED: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States in which a server that starts goes on with a batch."""


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """One file that a client has sent, or that a batch has made. Times are seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class RequestCounts(msgspec.Struct, frozen=True):
    """How many lines a batch has, and of how many there are answers or errors."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch as a whole has failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """OpenAI's list of them."""

    data: tuple[BatchError, ...]
    object: Literal["list"] = "list"


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. Times are seconds since 1970; those that have not come are None."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    object: Literal["batch"] = "batch"
    status: BatchStatus = "validating"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None

    def turned(self, status: BatchStatus, now_s: int) -> "BatchObject":
        """Return it in another state, which it enters now."""
        changes: dict[str, object] = {"status": status, f"{status}_at": now_s}
        return msgspec.structs.replace(self, **changes)


class NewBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
