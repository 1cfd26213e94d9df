"""Render chat templates in a process that may be ended at any time: `python template_worker.py DESCRIPTOR LIMITS`.

A template comes with a model or an adapter, and is a program: nothing else bounds what its loops and products cost. So
the operating system bounds this process: a render that takes too much processor time ends it, one that takes too much
memory fails. It imports nothing of the project, so that it starts quickly. Its environment is that of transformers'
`apply_chat_template`, whose templates these are.
"""

import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LENGTH = struct.Struct("<Q")
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


def serve(jobs: BinaryIO, answers: BinaryIO, most_cpu_s: float) -> None:
    """Answer jobs until the other end closes."""
    compiled = lru_cache(_MOST_COMPILED)(make_environment().from_string)
    while len(header := jobs.read(LENGTH.size)) == LENGTH.size:
        job = json.loads(jobs.read(LENGTH.unpack(header)[0]))
        signal.setitimer(
            signal.ITIMER_PROF, most_cpu_s
        )  # its signal ends a process that has no handler for it
        answer = json.dumps(render(job, compiled)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


def main(descriptor: int, most_cpu_s: float, most_bytes: int) -> None:
    """Bound this process, and serve the socket that has this descriptor."""
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    with socket.socket(fileno=descriptor) as end, end.makefile("rb") as jobs, end.makefile("wb") as answers:
        serve(jobs, answers, most_cpu_s)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
