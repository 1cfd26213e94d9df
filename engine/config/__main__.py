"""python -m engine.config: write the reference of all options, docs/options.md, to standard output."""

import sys
from collections.abc import Iterator, Sequence
from textwrap import wrap

from engine.config.command_line import BATCH_OPTIONS, SERVE_OPTIONS
from engine.config.option import Option
from engine.config.option_types import FLAG

_WIDTH = 100
_INTRODUCTION = """\
# Options

This page is made by `python -m engine.config > docs/options.md`; do not edit it.

`python -m engine.serve` takes every option but those of the group *batch*, and `python -m engine.batch` those of
*batch*, *model*, *adapters* and *scheduling*. An option is given as a flag or as a key of the TOML file that
`--config` names. Some have an environment variable too. The command line wins over the environment, and that over
the file. `LLM(...)` takes the options of *model*, *adapters* and *scheduling* by keyword, named like the TOML keys.
In place of `lora` it takes `loras`, a mapping from names to folders. A yes-or-no option has a second flag that
begins with `--no-`.

Each option is listed by its flag, its TOML key, its environment variable if any, and its default; then what it means.
One without a default is off, or its value is derived from the model and the machine.
"""


def reference(options: Sequence[Option]) -> str:
    """Return the options' reference in Markdown: a heading a group, an item an option."""
    lines = [line for text in _INTRODUCTION.split("\n\n") for line in (*_paragraph(text), "")]
    for group in dict.fromkeys(option.group for option in options):
        lines += [f"## {group.capitalize()}", ""]
        for option in options:
            if option.group == group:
                lines += _item(option)
        lines.append("")
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    return wrap(" ".join(text.split()), _WIDTH, break_on_hyphens=False, break_long_words=False)


def _item(option: Option) -> Iterator[str]:
    """Return the lines of one option: how it is given, and below it the meaning."""
    yield f"- {', '.join(_spellings(option))}; {_default(option)}."
    meaning = option.meaning[0].upper() + option.meaning[1:]
    yield from wrap(
        f"{meaning}.", _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _spellings(option: Option) -> Iterator[str]:
    if option.has_flag:
        metavar = "" if option.type is FLAG else f" {option.type.metavar}"
        yield " or ".join(f"`{flag}{metavar}`" for flag in (option.short, f"--{option.name}") if flag)
        yield f"`{option.key}`"
    if option.variable:
        yield f"`{option.variable}`"


def _default(option: Option) -> str:
    if option.short:
        return "required"
    if option.default in (None, ()):
        return "no default"
    return f"default `{str(option.default).lower() if option.type is FLAG else option.default}`"


def main() -> None:
    """Write the reference of every option of both programs."""
    sys.stdout.write(reference(tuple(dict.fromkeys((*BATCH_OPTIONS, *SERVE_OPTIONS)))))


if __name__ == "__main__":
    main()
