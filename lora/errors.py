"""What can go wrong with an adapter, by name; each message says what, which value, and the remedy."""

from concurrent.futures import Future


class AdapterRefused(ValueError):
    """The adapter is not served, because serving it would be wrong or impossible; nothing was changed.

    `may_pass` says that its files may be sound, and that reading them again may find them so.
    """

    def __init__(self, name: str, reason: str, may_pass: bool = False) -> None:
        super().__init__(f"adapter {name!r} is refused: {reason}")
        self.name = name
        self.reason = reason
        self.may_pass = may_pass


class InvalidName(AdapterRefused):
    """No adapter may have this name."""


class NameTaken(AdapterRefused):
    """The name means something already, and was not to be given another meaning."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "the name is loaded already")


class SourceAbsent(AdapterRefused):
    """There is no adapter at its source."""


class UnknownAdapter(LookupError):
    """No adapter of this name is known, or its content is gone."""

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} is not known: load it first, or ask /v1/models for the names")
        self.name = name


class AdapterLost(RuntimeError):
    """A known adapter's content can no longer be had from any tier."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name!r} cannot be brought back: {reason}")
        self.name = name
        self.reason = reason


class AdapterUnreachable(RuntimeError):
    """Nobody who could be asked knows the name, and not everybody could be asked."""

    def __init__(self, name: str, silent: int, peers: int) -> None:
        super().__init__(
            f"adapter {name!r} is not known here, and {silent} of {peers} peers did not answer: try again later, "
            "the log of this server has the reason"
        )
        self.name = name


class BytesMayLand(RuntimeError):
    """A pull was given up whose bytes may still come: its destination is nobody's until `settled` is done."""

    def __init__(self, settled: Future[None]) -> None:
        super().__init__("bytes of an abandoned pull may still land: use other pages")
        self.settled = settled
