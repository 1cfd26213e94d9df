"""Say which URLs adapters may be fetched from, and where an adapter of a name is looked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora.adapter import is_name
from lora.sources.source_url import InvalidSource, SourceUrl, quoted

_HOLE = "{name}"
_SAMPLE = "a-name-to-try"


@dataclass(frozen=True, slots=True)
class SourceTemplate:
    """A URL with `{name}` in its path, by which an adapter is found that is known by nothing but its name."""

    text: str

    @classmethod
    def parse(cls, text: str) -> "SourceTemplate":
        """Read a template. Raises InvalidSource."""
        remedy = "give a URL with {name} once, below its host or bucket: s3://bucket/adapters/{name}"
        if text.count(_HOLE) != 1 or "{" in text.replace(_HOLE, "") or "}" in text.replace(_HOLE, ""):
            raise InvalidSource(remedy)
        template = cls(text)
        found = SourceUrl.parse(text.replace(_HOLE, _SAMPLE))
        is_below = any(_SAMPLE in segment for segment in found.segments)
        if not is_below or not (found.host or _SAMPLE not in found.segments[0]):
            raise InvalidSource(remedy)
        return template

    @property
    def base(self) -> SourceUrl:
        """The folder that all its adapters lie below."""
        found = SourceUrl.parse(self.text.replace(_HOLE, _SAMPLE))
        above: list[str] = []
        for segment in found.segments:
            if _SAMPLE in segment:
                break
            above.append(segment)
        return SourceUrl(found.scheme, found.host, tuple(above))

    def of(self, name: str) -> SourceUrl | None:
        """Return where an adapter of this name would be; None for a name that could lead elsewhere."""
        scheme = self.text.partition("://")[0].lower()
        if not is_name(name) or "/" in name or (scheme == "hf" and "@" in name):
            return None
        try:
            return SourceUrl.parse(self.text.replace(_HOLE, quoted(name, scheme)))
        except InvalidSource:
            return None


@dataclass(frozen=True, slots=True)
class AllowedSources:
    """The URLs below which adapters may be fetched: the `prefixes`, the template's base, and `named` ones themselves.

    A prefix allows itself and what lies below it by whole parts of the path: s3://bucket/team does not allow
    s3://bucket/team-b. One of the hub with a revision allows that revision alone.
    """

    prefixes: tuple[SourceUrl, ...] = ()
    template: SourceTemplate | None = None
    named: frozenset[SourceUrl] = frozenset()

    @classmethod
    def of(
        cls, prefixes: Iterable[str], template: str | None = None, named: Iterable[SourceUrl] = ()
    ) -> "AllowedSources":
        """Read what an operator gives. Raises InvalidSource."""
        parsed = tuple(SourceUrl.parse(prefix) for prefix in prefixes)
        if any(prefix.query for prefix in parsed):
            raise InvalidSource("give a URL without a query")
        return cls(parsed, SourceTemplate.parse(template) if template else None, frozenset(named))

    @property
    def is_empty(self) -> bool:
        """Tell whether clients may name no URL at all."""
        return not self.prefixes and self.template is None

    @property
    def bases(self) -> tuple[SourceUrl, ...]:
        """What all that clients may name lies below."""
        return self.prefixes if self.template is None else (*self.prefixes, self.template.base)

    def allows(self, url: SourceUrl) -> bool:
        """Tell whether this URL, of a folder or of a file, may be fetched."""
        return url in self.named or any(_is_below(url, base) for base in self.bases)

    def allows_redirect(self, asked: SourceUrl, target: SourceUrl) -> bool:
        """Tell whether what answers for a file of `asked` may send on to `target`."""
        return self.allows(target) or (asked in self.named and _is_below(target, asked))


NOWHERE = AllowedSources()


def _is_below(url: SourceUrl, base: SourceUrl) -> bool:
    if (url.scheme, url.host) != (base.scheme, base.host):
        return False
    if base.revision and (url.revision != base.revision or url.segments != base.segments):
        return False
    return url.segments[: len(base.segments)] == base.segments
