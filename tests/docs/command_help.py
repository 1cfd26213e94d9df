"""Print the help of many commands, each asked once, in one process: JSON in on stdin, JSON out on stdout.

The input is a list of argument lists, `[module or file, argument, ...]`; the output maps each one's words, joined by
spaces, to what it printed for `--help`. A process of its own, since commands may set up what tests must not meet.
"""

import io
import json
import runpy
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout


def help_of(command: Sequence[str]) -> str:
    """What the command prints when it is asked for its help; the error if it does not end by itself."""
    printed = io.StringIO()
    sys.argv = [*command, "--help"]
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            if command[0].endswith(".py"):
                runpy.run_path(command[0], run_name="__main__")
            else:
                runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return printed.getvalue() if not ended.code else f"exit {ended.code}: {printed.getvalue()}"
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return f"no help: {printed.getvalue()}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of modules that another command has imported already
    json.dump({" ".join(command): help_of(command) for command in json.load(sys.stdin)}, sys.stdout)
