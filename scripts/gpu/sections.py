"""Sections: what is done, in order of worth, within the time that there is."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.gpu.row import Row, skipped
from scripts.gpu.stand import Stand


@dataclass(frozen=True, slots=True)
class Section:
    """A module of this package whose `rows(stand)` are its findings; not begun with less than `needs_s` left, nor
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


def run(sections: Sequence[Section], stand: Stand, tell: Callable[[Row], None]) -> list[Row]:
    """Every section's rows; each row is told as it comes."""
    found = []
    for section in sections:
        for row in _rows(section, stand):
            told = row.rehearsed() if stand.is_rehearsal else row
            found.append(told.within(section.name))
            tell(found[-1])
    return found


def _rows(section: Section, stand: Stand) -> Iterator[Row]:
    left_s = stand.left_s
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
    yield from stand.guarded(section.name, module.rows(stand))
