"""The engines that the offline benchmark compares, each behind a command line of its own. Knows no results.

An engine turns a job into processes that read workload files and write one result file for each. The
baselines' harnesses are scripts outside this project, found by path. Their environments are folders made
beforehand: `hf/` and `vllm/` are virtual environments, `llama-build/` is llama.cpp's build.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[3]
"""Where engines run, so that loraserve's modules are found."""


@dataclass(frozen=True, slots=True)
class OfflineJob:
    """Workloads of one kind on one model. `adapters` is the index; results go to `out`."""

    model: Path
    adapters: Path
    workloads: tuple[Path, ...]
    uses_adapters: bool
    dtype: str
    repeats: int
    quiet_s: float
    out: Path

    def options(self) -> list[str]:
        """Give the options that all harnesses share."""
        files = [option for path in self.workloads for option in ("--workload", str(path))]
        timing = ["--repeats", str(self.repeats), "--quiet-wait", str(self.quiet_s)]
        return [*files, *timing, "--out-dir", str(self.out)]

    def checkpoint(self) -> list[str]:
        """Give the options of harnesses that read the checkpoint itself."""
        return ["--model", str(self.model), "--adapters", str(self.adapters), "--dtype", self.dtype]


class ComparedEngine(Protocol):
    """One engine."""

    @property
    def name(self) -> str:
        """Name it in the results."""
        ...

    @property
    def needs(self) -> Sequence[Path]:
        """Files without which it cannot run."""
        ...

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        """Give what to run, one after the other; the last one measures."""
        ...


@dataclass(frozen=True, slots=True)
class Loraserve:
    """This project's engine."""

    name: str = "loraserve"

    @property
    def needs(self) -> Sequence[Path]:
        """See ComparedEngine."""
        return ()

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        """See ComparedEngine."""
        return ([sys.executable, "-m", "scripts.bench.engine.harness", *job.checkpoint(), *job.options()],)


@dataclass(frozen=True, slots=True)
class Transformers:
    """transformers with PEFT, one batch, adapters by row."""

    scripts: Path
    home: Path
    name: str = "transformers+peft"

    @property
    def needs(self) -> Sequence[Path]:
        """See ComparedEngine."""
        return self.home / "hf/bin/python", self.scripts / "peer_hf.py"

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        """See ComparedEngine."""
        python, script = map(str, self.needs)
        return ([python, script, *job.checkpoint(), *job.options()],)


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's CPU build; LoRA is switched on only where a workload uses it, since it costs the base speed."""

    scripts: Path
    home: Path
    name: str = "vllm"

    @property
    def needs(self) -> Sequence[Path]:
        """See ComparedEngine."""
        return self.home / "vllm/bin/python", self.scripts / "peer_vllm.py", self.scripts / "vllm_env.sh"

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        """See ComparedEngine."""
        python, script, environment = map(str, self.needs)
        lora = ["--lora"] if job.uses_adapters else []
        measure = shlex.join([python, script, *job.checkpoint(), *job.options(), *lora])
        prepare = f"VLLM_VENV={shlex.quote(str(self.home / 'vllm'))}; . {shlex.quote(environment)}"
        return (["bash", "-c", f"{prepare}; exec {measure}"],)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's server on loopback; checkpoint and adapters are converted to its format once."""

    scripts: Path
    home: Path
    name: str = "llama.cpp"

    @property
    def needs(self) -> Sequence[Path]:
        """See ComparedEngine."""
        server = self.home / "llama-build/bin/llama-server"
        return self.home / "hf/bin/python", server, self.scripts / "peer_llamacpp.py", *self.sources()[:1]

    def sources(self) -> list[Path]:
        """Find llama.cpp's own sources, which hold its converters."""
        return sorted(self.home.glob("dl/llama_cpp_python-*/vendor/llama.cpp")) or [self.home / "dl"]

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        """See ComparedEngine."""
        python, server, script, sources = map(str, self.needs)
        folder = self.home / "gguf" / f"{job.model.name}-{job.dtype}"
        model, adapters = folder / "model.gguf", folder / "adapters"
        outtype = {"bf16": "bf16", "fp32": "f32"}[job.dtype]
        convert = [
            *(python, str(self.scripts / "convert_gguf.py"), "--llama", sources, "--model", str(job.model)),
            *("--out", str(model), "--outtype", outtype, "--lora-outtype", outtype),
            *("--adapters", str(job.adapters), "--adapters-out", str(adapters)),
        ]
        measure = [
            *(python, script, "--server", server, "--model", str(model), "--port", str(free_port())),
            *("--adapters", str(adapters / "index.json"), *job.options()),
        ]
        folder.mkdir(parents=True, exist_ok=True)
        done = (adapters / "index.json").exists()
        return (measure,) if done else (convert, measure)


def free_port() -> int:
    """Find a port of the loopback interface that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class EngineFailed(RuntimeError):
    """An engine's process failed or took too long; the message ends with what it said last."""


def execute(command: Sequence[str], log: Path, timeout_s: float) -> None:
    """Run a command with its output in a file; on the time limit its whole session is ended.

    Raises EngineFailed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise EngineFailed(f"took over {timeout_s:.0f} s: {log}") from error
    if status:
        raise EngineFailed(f"exit status {status}: {log}: …{tail(log)}")


def tail(log: Path, characters: int = 600) -> str:
    """Read the end of a log."""
    return log.read_text(errors="replace")[-characters:]
