"""Measure how much of the library one request runs: what somebody who follows it through the code would read.

    python -m scripts.reading --out build/reading.txt

Each path is gone once before it is recorded, so that the adapter is resident and nothing is loaded any more. A file
counts if one of its functions ran. A code line is one that is not blank, comment or docstring.
"""

import argparse
import ast
import asyncio
import io
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import CodeType, FrameType

import aiohttp

from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.config.config import EngineConfig, ServeConfig
from engine.llm import LLM
from engine.metrics.telemetry import Telemetry
from engine.serve import serve
from scheduler.request import Request, SamplingParams
from scripts.arguments import one_line

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("engine", "scheduler", "model", "lora", "transport")
KV_BYTES, BLOCK_TOKENS = 32 << 20, 16
ADAPTER, MESSAGES = "reverse", [{"role": "user", "content": "garden"}]
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Recorder:
    """Collects the code of all functions that run while it is on, on the threads that were begun under it."""

    def __init__(self) -> None:
        self.ran: set[CodeType] = set()
        self._on = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self._on:
            self.ran.add(frame.f_code)
            if frame.f_back is not None:  # a thread's loop may have been entered before the recorder was on
                self.ran.add(frame.f_back.f_code)

    @contextmanager
    def on(self) -> Generator[None, None, None]:
        """Collect what runs meanwhile."""
        self._on = True
        try:
            yield
        finally:
            self._on = False


def code_lines(text: str) -> frozenset[int]:
    """Find the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(('"""', 'r"""'))
        if token.type not in _LAYOUT and token.type != tokenize.COMMENT and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return frozenset(lines)


def function_lines(text: str) -> Iterator[range]:
    """Find the lines of every function, with its decorators."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
            yield range(first, (node.end_lineno or node.lineno) + 1)


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file of which a function ran: its sizes, and those of the functions that ran."""

    name: str
    lines: int
    code_lines: int
    functions: int
    function_code_lines: int


def file_read(path: Path, root: Path, first_lines: set[int]) -> FileRead | None:
    """Size up a file of which code ran that begins at these lines; None if it is in no function."""
    name, text = str(path.relative_to(root)), path.read_text()
    functions = list(function_lines(text))
    around = ([lines for lines in functions if first in lines] for first in first_lines)
    ran = {max(each, key=lambda lines: lines.start) for each in around if each}
    code = code_lines(text)
    in_ran = code.intersection(set[int]().union(*ran))
    return FileRead(name, len(text.splitlines()), len(code), len(ran), len(in_ran)) if ran else None


def files_read(ran: set[CodeType], root: Path = ROOT, folders: Sequence[str] = LIBRARY) -> list[FileRead]:
    """Size up the files below the folders that the code is from, in the order of their names."""
    first_lines: dict[Path, set[int]] = {}
    for code in ran:
        path = Path(code.co_filename)
        if any(root / folder in path.parents for folder in folders):
            first_lines.setdefault(path, set()).add(code.co_firstlineno)
    found = (file_read(path, root, lines) for path, lines in sorted(first_lines.items()))
    return [read for read in found if read is not None]


def decode_step(recorder: Recorder) -> None:
    """Record the step in which one decoding sequence fills a block: no text, no sockets."""
    config = EngineConfig(kv_cache_bytes=KV_BYTES, block_size=BLOCK_TOKENS, progress=False)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, seed=0)
    with closing(assemble(config)) as engine:
        prompt, adapter = engine.tokenizer.encode_chat(MESSAGES), engine.store.registry.resolve(ADAPTER)
        engine.core.submit(Request("reading", prompt, adapter, params, (), time.monotonic()))
        tokens = len(prompt)
        while tokens < BLOCK_TOKENS:
            result = engine.core.step()
            tokens += len(result.events)
            if result.idle:
                engine.wait_ready()
        with recorder.on():
            engine.core.step()


async def chat_request(recorder: Recorder) -> None:
    """Record one chat completion through the HTTP application, from its socket to its socket."""
    config = ServeConfig(EngineConfig(kv_cache_bytes=KV_BYTES, progress=False), port=0)
    node = AsyncEngine(assemble(config.engine), Telemetry(), config.max_waiting)
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(node, config, address.set_result, stop))
    body = {"model": ADAPTER, "messages": MESSAGES, "temperature": 0}
    try:
        async with aiohttp.ClientSession(await address, raise_for_status=True) as client:
            await (await client.post("/v1/chat/completions", json=body)).read()
            with recorder.on():
                await (await client.post("/v1/chat/completions", json=body)).read()
    finally:
        stop.set()
        await server


def offline_request(recorder: Recorder) -> None:
    """Record one conversation that an LLM answers."""
    with closing(LLM(kv_cache_bytes=KV_BYTES)) as llm:
        llm.chat([MESSAGES], SamplingParams(temperature=0), ADAPTER)
        with recorder.on():
            llm.chat([MESSAGES], SamplingParams(temperature=0), ADAPTER)


PATHS: Mapping[str, Callable[[Recorder], None]] = {
    "decode step": decode_step,
    "HTTP chat request": lambda recorder: asyncio.run(chat_request(recorder)),
    "offline request": offline_request,
}


def record(path: Callable[[Recorder], None]) -> set[CodeType]:
    """Watch this thread, and those that begin meanwhile, while a path runs; return what it recorded."""
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        path(recorder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType] - None undoes it
    return recorder.ran


def table(found: Mapping[str, Sequence[FileRead]]) -> str:
    """Write a row of sums for each name, in Markdown."""
    rows = ["| | files | lines | code lines | functions that ran | code lines in them |", "|---" * 6 + "|"]
    for name, files in found.items():
        sizes = zip(*(astuple(file)[1:] for file in files), strict=True)
        rows.append(f"| {name} | {len(files)} | {' | '.join(str(sum(size)) for size in sizes)} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every path and print the table; with --out keep it, and every path's files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a file for the table and the files of every path")
    given = parser.parse_args(arguments)
    found = {name: files_read(record(path)) for name, path in PATHS.items()}
    print(table(found), end="")
    if given.out:
        each = (
            f"\n{name}\n\n{table({file.name: [file] for file in files})}" for name, files in found.items()
        )
        given.out.write_text(table(found) + "".join(each))


if __name__ == "__main__":
    with one_line("scripts.reading"):
        main()
