"""Tokenizers of each kind that models have: bytes, byte-level merges, and words with bytes to fall back on."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from engine.tokenizer import Tokenizer

BOS, EOS = "<|begin|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'refuse me' %}{{ raise_exception('no such talk') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, BOS in front, and a chat template (or none)."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = RawTokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    made.chat_template = chat_template
    return made


def merging_tokenizer() -> Tokenizer:
    """Byte-level BPE with merges, so that tokens hold several characters, or parts of them."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["abcabcab stop stop ünïcödé 你好你好 🙂🙂"] * 4, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


WORDS = {
    token: index
    for index, token in enumerate(
        ["▁the", "▁fox", "es", "▁", "a", "🙂", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
}


def sentencepiece_tokenizer() -> Tokenizer:
    """Words that carry their space in front, with bytes to fall back on, as Llama 2 and Mistral have."""
    tokenizer = RawTokenizer(models.BPE(vocab=WORDS, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
