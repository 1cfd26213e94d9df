"""AdapterRef: the value that names an adapter everywhere. Torch-free, so that decisions may hold it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter's identity and size; two refs are equal when their content is, whatever they are called.

    `digest` is the content digest (hex) of the adapter's flat form, `rank` the largest rank of any of its
    modules, `sites` the module kinds it changes (`q_proj`, ...), `nbytes` the bytes of its flat form.
    """

    digest: str
    name: str = field(compare=False)
    rank: int = field(compare=False)
    sites: tuple[str, ...] = field(compare=False)
    nbytes: int = field(compare=False)

    @property
    def is_base(self) -> bool:
        """True for the base model, which is an adapter of rank 0 and never `None`."""
        return self.rank == 0


BASE = AdapterRef(digest="", name="", rank=0, sites=(), nbytes=0)
