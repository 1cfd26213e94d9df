"""Load the tokenizer of a model, with what an operator gives in place of its chat template.

It stands apart from `engine.tokenizer` because reading a model's files needs transformers, which takes seconds to
import, and tokenising does not.
"""

from pathlib import Path

from engine.errors import InvalidConfig
from engine.text.chat_template import read_template
from engine.text.template_renderer import BrokenTemplate
from engine.text.tokenizer_files import read_tokenizer, readable
from engine.text.tool_syntax import ToolParser
from engine.tokenizer import Tokenizer, TokenizerFailed


def load_tokenizer(
    model: str | Path, chat_template: str | Path | None = None, tool_parser: ToolParser = "auto"
) -> Tokenizer:
    """Load the tokenizer of a model folder, without the network, or of a hub id. Raises InvalidConfig.

    `chat_template` is a file, or the template itself, to be used in place of the model's. `tool_parser` says how the
    model writes calls of tools.
    """
    source = None if chat_template is None else read_template(chat_template)
    tokenizer = read_tokenizer(model)
    try:
        with readable(model):
            made = Tokenizer(tokenizer, source, tool_parser)
            made.check()
    except TokenizerFailed as error:
        raise InvalidConfig("model", str(model), f"its tokenizer cannot be read: {error}") from error
    except BrokenTemplate as error:
        if chat_template is None:
            raise InvalidConfig("model", str(model), f"{error}, with --chat-template") from error
        raise InvalidConfig("chat_template", str(chat_template), str(error)) from error
    return made
