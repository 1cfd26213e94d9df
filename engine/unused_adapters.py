"""Say once of an activated LoRA that a prompt came without its invocation, so that the base answered alone."""

import logging

from lora.activation import NEVER
from scheduler.request import Request

_MOST_TOLD = 4096
_log = logging.getLogger(__name__)


class UnusedAdapters:
    """Whose prompts were seen to lack their invocation. Any thread may ask."""

    def __init__(self) -> None:
        self._told: dict[str, None] = {}  # by digest

    def acts(self, request: Request) -> bool:
        """Return whether an adapter acts on any of the request's tokens; what is no client's is not told of."""
        adapter = request.adapter
        if adapter.is_base:
            return False
        if request.adapted_from != NEVER:
            return True
        if adapter.digest not in self._told and not request.background:
            if len(self._told) >= _MOST_TOLD:
                self._told.clear()
            self._told[adapter.digest] = None
            _log.warning(
                "the prompt of %s has no invocation of the adapter %s (token ids %s): the base model answers alone",
                request.request_id,
                adapter.name,
                list(adapter.invocation),
            )
        return False
