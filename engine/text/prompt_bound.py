"""Bound how many characters a prompt of so many tokens can have, so that a longer text is never tokenised.

Tokenising takes seconds for megabytes, while counting characters takes no time. The bound is exact in the sense that no
text beyond it fits, as long as the tokenizer keeps every character. One that drops some (spaces at the end, accents,
words that it does not know) has no such bound: its texts may have `DROPPING` times as many characters.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

DROPPING = 64
"""How many times the bound a text may have whose tokenizer drops characters; a longer one is refused, fit or not."""

_MOST_COMPOSED = (
    4  # characters that NFC and NFKC may turn into one: the longest canonical decomposition in Unicode
)
_KEEPING_NORMALIZERS = {
    **dict.fromkeys(("ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"), 1),
    **dict.fromkeys(("NFC", "NFKC"), _MOST_COMPOSED),
}
_SPACE_IN_FRONT = (r"\A▁", "▁▁")  # what transformers makes of SentencePiece's space in front of every text
_KEEPING_SPLITTERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


def most_chars_per_token(backend: Tokenizer) -> int:
    """Return how many characters of a text one token can stand for, on average over any text."""
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
    normalizing, splitting = (
        _steps(backend.normalizer, "normalizers"),
        _steps(backend.pre_tokenizer, "pretokenizers"),
    )
    shrinking = _shrinking(normalizing)
    keeps = shrinking and _splits_only(splitting) and _knows_all(backend, [*normalizing, *splitting])
    return longest * (shrinking if keeps else DROPPING)


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """Describe a normalizer or a pre-tokenizer by its steps, those of sequences in their order."""
    if component is None:
        return []
    found: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = [json.loads(component.__getstate__())]
    while pending:
        step = pending.pop()
        pending.extend(reversed(step.get(inner, ())))
        if inner not in step:
            found.append(step)
    return found


def _shrinking(steps: list[dict[str, Any]]) -> int:
    """Return how many characters the normalizer may turn into one; 0 if it may drop any number of them."""
    shrinking = 1
    for step in steps:
        shrinking *= (
            _replacing(step) if step["type"] == "Replace" else _KEEPING_NORMALIZERS.get(step["type"], 0)
        )
    return shrinking


def _replacing(step: Mapping[str, Any]) -> int:
    """Return how many characters a step that replaces one text by another may turn into one."""
    if (step["pattern"].get("Regex"), step["content"]) == _SPACE_IN_FRONT:
        return 1
    pattern, content = step["pattern"].get("String", ""), step["content"]
    return -(-len(pattern) // len(content)) if pattern and content else 0


def _splits_only(steps: list[dict[str, Any]]) -> bool:
    """Tell whether the pre-tokenizer hands on every character."""
    return all(step["type"] in _KEEPING_SPLITTERS and step.get("behavior") != "Removed" for step in steps)


def _knows_all(backend: Tokenizer, steps: list[dict[str, Any]]) -> bool:
    """Tell whether every byte has its token, so that no text is unknown, and no token takes the spaces around it."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return False
    alphabet = {f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else set[str]()
    if any(step["type"] == "ByteLevel" for step in steps):
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    swallowing = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    return bool(alphabet) and alphabet <= backend.get_vocab(with_added_tokens=False).keys() and not swallowing
