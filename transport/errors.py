"""Name what may go wrong between two nodes. Every error names the thing, and what to do about it."""


class TransportError(Exception):
    """Any failure of a transport; its subclasses say which, so that a caller can choose what to do."""


class PeerGone(TransportError):
    """The peer is dead, unreachable or hung up: drop it and use another source."""


class PullTimeout(TransportError):
    """The deadline passed: use another source, and reuse the destination only once it is settled."""


class LeaseExpired(TransportError):
    """The source no longer answers for the bytes: discard them and lease again."""


class NotOffered(TransportError):
    """The source has nothing by that name: refresh what is known of it, or use another source."""


class RegionRefused(TransportError):
    """A region lies outside its arena, or sizes differ: describe the memory again."""


class RegionBusy(TransportError):
    """Bytes may still land in the region, or it is published: wait for `settled` or `withdraw`."""


class HelloRefused(TransportError):
    """The two ends do not trust or understand each other: compare tokens, certificates and versions."""


class WireError(TransportError):
    """The peer sent something that is no message of this protocol: check what listens at that address."""


class PathUnavailable(TransportError):
    """The data path that was asked for is not offered by both ends: choose "auto", or repair the path."""


class TransportClosed(TransportError):
    """The transport was closed: open another."""
