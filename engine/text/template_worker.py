"""Render chat templates in a process that may be ended at any time: `python template_worker.py DESCRIPTOR LIMITS`.

A template comes with a model or an adapter, and is a program: nothing else bounds what its loops and products cost. So
the operating system bounds this process: a render that takes too much processor time ends it, one that takes too much
memory fails. Its environment is that of transformers'
`apply_chat_template`, whose templates these are.
"""

import json
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.text.bounded_jobs import serve_jobs

_MOST_COMPILED = 64  # templates that are kept compiled


class GenerationTag(Extension):
    """The tag around what an assistant said, which marks it for training and changes no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set, and reads it only

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A namespace without attributes that begin with an underscore, as transformers has it."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, *rest = arguments
        given = dict(*rest, **attributes)
        for name in given:
            _check_attribute(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}: begin its name with a letter")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """Make the environment that templates are rendered in."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    own = {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": PlainNamespace}
    made.globals |= own  # pyright: ignore[reportAttributeAccessIssue] - it is declared with what jinja2 puts there
    return made


def render(job: Mapping[str, Any], compiled: Callable[[str], Any]) -> dict[str, object]:
    """Render `job`'s template; return the text, or its length if it is too long, or why there is none."""
    try:
        parts: list[str] = []
        length = 0
        for part in compiled(job["template"]).generate(**job["variables"]):
            length += len(part)
            if length <= job["most_chars"]:
                parts.append(part)
    except TemplateSyntaxError as error:
        return {"broken": f"it is no Jinja template: {error}"}
    except MemoryError:
        return {"broken": "it needs too much memory"}
    except (SecurityError, OverflowError, RecursionError) as error:
        return {"broken": f"it does what no template may: {error}"}
    except Exception as error:  # noqa: BLE001 - whatever a template's program raises, it renders nothing
        return {"refused": str(error) or type(error).__name__}
    return {"text": "".join(parts)} if length <= job["most_chars"] else {"length": length}


if __name__ == "__main__":
    compile_template = lru_cache(_MOST_COMPILED)(make_environment().from_string)
    serve_jobs(
        lambda job: render(job, compile_template), int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    )
