"""Ask a server what its own description allows, and what it does not: python -m scripts.fuzz.openapi.

It serves the embedded model and lets schemathesis (`pip install schemathesis`, in an environment of its own)
draw requests. A status that the description lacks, a 5xx, a body of another shape, or a body accepted against
the description is a failure. Arguments are schemathesis', such as `--max-time 600`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from engine.demo.embedded import adapter_folders

# What is valid in form may still be beyond the model: too long a prompt, an id outside of its vocabulary.
# An adapter may be called `alias` or `pin`: the paths of these changes take what any adapter's does, too.
_NOT_CHECKED = "positive_data_acceptance,object_level_authorization,allow_header_conformance"
_OPTIONS = ("--phases", "coverage,fuzzing", "--continue-on-failure", "--max-examples", "100")


@contextmanager
def served() -> Generator[str]:
    """Serve the embedded model at a free port; the URL is known when it is ready."""
    root = next(iter(adapter_folders().values())).parent
    command = [sys.executable, "-m", "engine.serve", "--port", "0", "--no-progress", "--lora-root", str(root)]
    with tempfile.TemporaryDirectory() as folder:
        kept = ("--batch-dir", f"{folder}/batches", "--lora-push-dir", f"{folder}/pushed")
        with subprocess.Popen([*command, *kept], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None, "it is a pipe"
            try:
                ready = server.stdout.readline()
                yield ready.removeprefix("ready at ").partition(": ")[0]
            finally:
                server.terminate()


def description(url: str) -> dict[str, Any]:
    """Return the server's description, with the models that it has as the only ones to be asked."""
    with urlopen(f"{url}/openapi.json") as told, urlopen(f"{url}/v1/models") as listed:
        document, models = json.load(told), json.load(listed)
    for schema in document["components"]["schemas"].values():
        if (
            schema.get("properties", {}).get("model") == {"type": "string"}
            and "choices" not in schema["properties"]
        ):
            schema["properties"]["model"] = {"enum": [model["id"] for model in models["data"]]}
    return document


def main(arguments: Sequence[str]) -> int:
    """Run schemathesis and return its exit code: 0 if nothing was found."""
    program = shutil.which("schemathesis")
    if program is None:
        sys.stderr.write(
            "schemathesis is not on the path: pip install schemathesis, in its own environment\n"
        )
        return 2
    with served() as url, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "openapi.json"  # the folder takes what schemathesis caches, too
        file.write_text(json.dumps(description(url)))
        command = [program, "run", str(file), "--url", url, "--exclude-checks", _NOT_CHECKED, *_OPTIONS]
        return subprocess.run([*command, *arguments], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
