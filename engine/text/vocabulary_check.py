"""Check that an adapter was trained with the base model's tokens.

A LoRA holds no embeddings: a token that the base lacks has none, and one that means something else has a wrong one.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer

from lora.format.adapter_files import Flaw, short
from lora.format.companions import TOKENIZER_FILE, Companions, Vocabulary
from lora.format.peft_config import INVOCATION_FIELD

_REMEDY = "train with the base model's own tokenizer, or serve it merged into its base"
_SAMPLES = (
    "The quick brown fox  jumps\n\nover 12345 lazy dogs.",
    "Naïve ÜNÏCÖDE, 你好, 🙂 and e\u0301",
    "def f(x):\n\treturn x['a'] + 1  # <tag>",
)
"""What both tokenizers must turn into the same tokens; a normalizer of another kind shows here."""


def check_vocabulary(backend: Tokenizer, vocabulary: Vocabulary) -> None:
    """Raise Flaw if an adapter's files name tokens that the base's tokenizer lacks, or has under other ids."""
    _check_added(backend, vocabulary.added, vocabulary.padding)
    if vocabulary.tokenizer is not None:
        own = parse_tokenizer(vocabulary.tokenizer)
        added = own.get_added_tokens_decoder().items()
        _check_added(
            backend, tuple((token.content, token_id) for token_id, token in added), vocabulary.padding
        )
        _check_same(backend, own)


def check_invocation(backend: Tokenizer, token_ids: Sequence[int]) -> None:
    """Raise Flaw for tokens of an invocation that the base model lacks: no prompt could have them."""
    for token_id in token_ids:
        if backend.id_to_token(token_id) is None:
            raise Flaw(
                f"its {INVOCATION_FIELD} has {token_id}, which is no token of the base model's: train it with"
                " the base model's own tokenizer"
            )


def end_tokens(backend: Tokenizer, companions: Companions) -> tuple[int, ...]:
    """Return the ids of an adapter's own end tokens. Raises Flaw for one that the base model lacks."""
    ids = list(companions.eos_token_ids)
    if companions.eos_token is not None:
        found = backend.token_to_id(companions.eos_token)
        if found is None:
            raise Flaw(
                f"its eos_token {short(companions.eos_token)} is no token of the base model's: {_REMEDY}"
            )
        ids.append(found)
    for token_id in ids:
        if backend.id_to_token(token_id) is None:
            raise Flaw(f"its eos_token_id {token_id} is no token of the base model's: {_REMEDY}")
    return tuple(dict.fromkeys(ids))


def parse_tokenizer(content: bytes) -> Tokenizer:
    """Read a tokenizer.json. Raises Flaw."""
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:
        # A panic of its library is no Exception; nothing else that is none is kept back.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Flaw(f"{TOKENIZER_FILE} cannot be read ({error}): save the tokenizer again") from error


def _check_added(backend: Tokenizer, added: tuple[tuple[str, int], ...], padding: str | None) -> None:
    known = backend.get_vocab(with_added_tokens=True)
    for text, token_id in added:
        found = known.get(text)
        if found == token_id or (found is None and text == padding):
            continue
        has = "lacks" if found is None else f"has as {found}"
        raise Flaw(
            f"it was trained with the token {short(text)} (id {token_id}), which the base model {has}: {_REMEDY}"
        )


def _check_same(backend: Tokenizer, own: Tokenizer) -> None:
    """Raise Flaw unless both make the same tokens.

    A regular expression that the base has not is never matched: a stranger's may take for ever.
    """
    if not _patterns(own) <= _patterns(backend):
        raise Flaw(f"its {TOKENIZER_FILE} splits a text by other patterns than the base model's: {_REMEDY}")
    vocabularies = [each.get_vocab(with_added_tokens=False) for each in (backend, own)]
    encoded = [
        [encoding.ids for encoding in each.encode_batch_fast(list(_SAMPLES), add_special_tokens=False)]
        for each in (backend, own)
    ]
    if vocabularies[0] != vocabularies[1] or encoded[0] != encoded[1] or _merges(backend) != _merges(own):
        raise Flaw(f"its {TOKENIZER_FILE} makes other tokens of a text than the base model's: {_REMEDY}")


def _merges(tokenizer: Tokenizer) -> object:
    model = cast(dict[str, Any], json.loads(tokenizer.to_str())["model"])
    return model.get("merges")


def _patterns(tokenizer: Tokenizer) -> set[str]:
    """Return the regular expressions by which a tokenizer changes or splits a text."""
    found = set[str]()
    components: list[Any] = [tokenizer.normalizer, tokenizer.pre_tokenizer]
    pending: list[object] = [json.loads(each.__getstate__()) for each in components if each is not None]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            fields = cast(dict[str, object], value)
            found |= {str(pattern) for name, pattern in fields.items() if name == "Regex"}
            pending.extend(fields.values())
        elif isinstance(value, list):
            pending.extend(cast(list[object], value))
    return found
