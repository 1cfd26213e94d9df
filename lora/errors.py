"""What can go wrong with an adapter, by name; each message says what, which value, and the remedy."""


class AdapterRefused(ValueError):
    """The adapter is not served, because serving it would be wrong or impossible; nothing was changed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"adapter {name!r} is refused: {reason}")
        self.name = name
        self.reason = reason


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
