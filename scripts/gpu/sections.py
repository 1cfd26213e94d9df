"""The sections of a check, in order of worth, run within the time that there is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.gpu.context import CheckContext
from scripts.gpu.correctness import attention, lora, row_ops
from scripts.gpu.finding import Finding, skipped
from scripts.gpu.timing import launching, loading, lora_cost, machine, vendor_kernels

Find = Callable[[CheckContext], Iterator[Finding]]

OWN_PACKAGES = ("engine", "lora", "model", "scheduler", "scripts", "transport")


@dataclass(frozen=True, slots=True)
class Section:
    """What finds a section's findings; it is not begun with less than `needs_s` left."""

    name: str
    find: Find
    needs_s: float


def _find_engine(context: CheckContext) -> Iterator[Finding]:
    # Imported late: a GPU machine may lack what the engine imports, and the other sections run without it.
    # The package first: parts of it may be there from an earlier try that failed.
    import engine  # noqa: F401, PLC0415 # pyright: ignore[reportUnusedImport]
    from scripts.gpu.correctness import engine_tokens  # noqa: PLC0415

    return engine_tokens.findings(context)


def _find_serving(context: CheckContext) -> Iterator[Finding]:
    # As in _find_engine.
    import engine  # noqa: F401, PLC0415 # pyright: ignore[reportUnusedImport]
    from scripts.gpu.timing import serving  # noqa: PLC0415

    return serving.findings(context)


SECTIONS = (
    Section("machine", machine.findings, 5),
    Section("lora", lora.findings, 30),
    Section("attention", attention.findings, 20),
    Section("rows", row_ops.findings, 10),
    Section("engine", _find_engine, 60),
    Section("table", lora_cost.findings, 60),
    Section("serving", _find_serving, 60),
    Section("loading", loading.findings, 15),
    Section("launching", launching.findings, 5),
    Section("vendor_kernels", vendor_kernels.findings, 10),
)


def run(sections: Sequence[Section], context: CheckContext, tell: Callable[[Finding], None]) -> list[Finding]:
    """Run the sections; `tell` gets each finding as it comes."""
    found: list[Finding] = []
    for section in sections:
        for finding in _findings(section, context):
            kept = finding.untimed() if context.is_dry_run else finding
            found.append(kept.within(section.name))
            tell(found[-1])
    return found


def _findings(section: Section, context: CheckContext) -> Iterator[Finding]:
    left_s = context.left_s
    if left_s < section.needs_s:
        yield skipped(section.name, f"{max(0, left_s):.0f} s are left, it needs {section.needs_s:.0f}")
        return
    try:
        found = section.find(context)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OWN_PACKAGES:
            raise
        yield skipped(section.name, f"{error.name} is not installed")
        return
    yield from context.guarded(section.name, found)
