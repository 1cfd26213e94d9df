"""Name the ways in which models write calls of tools, and tell a model's own by its chat template.

Each is the text that a family of models was trained to write:

- hermes (Hermes, Qwen): `<tool_call>{"name": "f", "arguments": {}}</tool_call>`, between other text;
- llama3_json (Llama 3.x): `{"name": "f", "parameters": {}}` as the whole answer, several with `;` between them;
- mistral: `[TOOL_CALLS]` with a list of such objects, or with names that are followed by their arguments.
"""

from typing import Literal

from engine.config.config import ToolParser

ToolSyntax = Literal["hermes", "llama3_json", "mistral"]

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
LLAMA_TAG = "<|python_tag|>"
MISTRAL_OPEN = "[TOOL_CALLS]"
_SIGNS: tuple[tuple[str, ToolSyntax], ...] = (
    (HERMES_OPEN, "hermes"),
    (MISTRAL_OPEN, "mistral"),
    (LLAMA_TAG, "llama3_json"),
    ('{"name": function name, "parameters":', "llama3_json"),  # Llama 3.2's words
)


def tool_syntax(parser: ToolParser, template: str | None) -> ToolSyntax | None:
    """Return the syntax that `parser` names; with auto the one that `template` speaks of, if it does."""
    if parser == "none":
        return None
    if parser != "auto":
        return parser
    return next((syntax for sign, syntax in _SIGNS if sign in (template or "")), None)
