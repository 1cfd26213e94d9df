"""Sections: what is done, in order of worth, within the time that there is."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.gpu.finding import Finding, skipped
from scripts.gpu.context import CheckContext


@dataclass(frozen=True, slots=True)
class Section:
    """A module of this package whose `rows(context)` are its findings; not begun with less than `needs_s` left, nor
    where `package` cannot be imported whole: parts of it may be there from an earlier try."""

    name: str
    module: str
    needs_s: float
    package: str = "model"


SECTIONS = (
    Section("machine", "machine", 5),
    Section("lora", "kernels_lora", 30),
    Section("attention", "kernels_attention", 20),
    Section("rows", "kernels_rows", 10),
    Section("engine", "engine_tokens", 60, "engine"),
    Section("table", "lora_table", 60),
    Section("serving", "serving", 60, "engine"),
    Section("loading", "loading", 15),
    Section("launching", "launching", 5),
    Section("others", "others", 10),
)


def run(sections: Sequence[Section], context: CheckContext, tell: Callable[[Finding], None]) -> list[Finding]:
    """Every section's rows; each row is told as it comes."""
    found = []
    for section in sections:
        for row in _rows(section, context):
            told = row.rehearsed() if context.is_dry_run else row
            found.append(told.within(section.name))
            tell(found[-1])
    return found


def _rows(section: Section, context: CheckContext) -> Iterator[Finding]:
    left_s = context.left_s
    if left_s < section.needs_s:
        yield skipped(section.name, f"{max(0, left_s):.0f} s are left, it needs {section.needs_s:.0f}")
        return
    try:
        importlib.import_module(section.package)
        module = importlib.import_module(f"scripts.gpu.{section.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in (
            "engine",
            "lora",
            "model",
            "scheduler",
            "scripts",
            "transport",
        ):
            raise
        yield skipped(section.name, f"{error.name} is not installed")
        return
    yield from context.guarded(section.name, module.rows(context))
