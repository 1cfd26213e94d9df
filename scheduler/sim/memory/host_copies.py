"""HostCopies: the adapters of which a simulated node's host memory has a copy.

Stands in for the live store's host tier: bounded by bytes, the longest unused goes first. What leaves the card is
copied here while steps go on, which takes no time.
"""

from collections import OrderedDict

from lora.adapter import AdapterRef


class HostCopies:
    """Up to `capacity_bytes` of adapters."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._copies: OrderedDict[str, AdapterRef] = OrderedDict()  # the longest unused first
        self.used_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def put(self, adapter: AdapterRef) -> None:
        """Copy an adapter here, or note that its copy was used; others go for it."""
        if adapter.nbytes > self._capacity_bytes:
            return
        if adapter.digest not in self._copies:
            self._copies[adapter.digest] = adapter
            self.used_bytes += adapter.nbytes
        self._copies.move_to_end(adapter.digest)
        while self.used_bytes > self._capacity_bytes:
            _, gone = self._copies.popitem(last=False)
            self.used_bytes -= gone.nbytes

    def check(self, name: str) -> None:
        """Assert that the copies are within their bound."""
        used_bytes = sum(ref.nbytes for ref in self._copies.values())
        assert used_bytes == self.used_bytes <= self._capacity_bytes, f"{name} exceeds its host memory"
