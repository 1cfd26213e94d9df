"""Text and conversations as token ids, and what each token is in text."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.errors import InvalidConfig
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import PromptTooLong, Tokenizer
from tests.fakes.tokenizers import BOS, EOS, byte_tokenizer, merging_tokenizer

BYTES, MERGING = Tokenizer(byte_tokenizer()), merging_tokenizer()


def test_a_prompt_gets_what_the_model_expects_in_front_and_a_conversation_its_template() -> None:
    assert BYTES.decode(BYTES.encode("hi"), skip_special=False) == f"{BOS}hi"
    token_ids = BYTES.encode_chat([{"role": "user", "content": "hi"}])
    assert BYTES.decode(token_ids, skip_special=False) == "user: hi\nassistant: "


def test_a_model_without_a_template_and_a_template_that_refuses_say_so() -> None:
    with pytest.raises(InvalidChat, match="use /v1/completions"):
        Tokenizer(byte_tokenizer(chat_template=None)).encode_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidChat, match="no such talk"):
        BYTES.encode_chat([{"role": "user", "content": "refuse me"}])


def test_tokens_that_are_no_utf8_by_themselves_have_distinct_names() -> None:
    first, second = BYTES.encode("é", add_special=False)
    assert (BYTES.token_text(first), BYTES.token_text(second)) == (r"bytes:\xc3", r"bytes:\xa9")
    assert BYTES.token_bytes(first) + BYTES.token_bytes(second) == "é".encode()
    assert BYTES.token_bytes(BYTES.vocab_size + 7) == b""


@settings(deadline=None)
@given(st.text())
def test_the_characters_that_begin_in_tokens_add_up(text: str) -> None:
    assert sum(map(MERGING.num_chars, MERGING.encode(text, add_special=False))) == len(text)


def test_a_tokenizer_is_read_from_a_folder_and_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.encode("hi") == BYTES.encode("hi")
    assert tokenizer.has_chat_template
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidConfig, match="empty"):
        load_tokenizer(tmp_path / "empty")


def test_a_tokenizer_tells_its_end_and_which_texts_are_special_tokens() -> None:
    (end,) = BYTES.encode(EOS, add_special=False)
    assert BYTES.eos_token_ids == (end,)
    assert MERGING.eos_token_ids == ()
    assert BYTES.special_among(("a", EOS)) == {end: EOS}


@pytest.mark.parametrize("template", ["{% for", 5, ["x"]])
def test_a_chat_template_that_cannot_be_read_is_refused_at_start(tmp_path: Path, template: object) -> None:
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(InvalidConfig, match=r"chat template|tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_spoilt_tokenizer_file_is_refused_in_one_line(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(InvalidConfig, match="its tokenizer cannot be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_is_tokenised_and_written_by_several_threads_at_once() -> None:
    texts = [f"{number} ünïcödé 你好 🙂 " * 50 for number in range(8)]

    def there_and_back(text: str) -> str:
        BYTES.encode_chat([{"role": "user", "content": text}])
        return BYTES.decode(BYTES.encode(text))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(there_and_back, texts * 8)) == texts * 8


def test_other_threads_go_on_while_a_text_is_tokenised_and_written() -> None:
    """Holding the interpreter's lock, a call would let another thread wake up once: after it."""
    wakes, done = [0], threading.Event()

    def keep_waking() -> None:
        while not done.wait(0.0005):
            wakes[0] += 1

    waking = threading.Thread(target=keep_waking)
    waking.start()
    token_ids = BYTES.encode("The quick brown fox. " * 40_000)
    encoded = wakes[0]
    BYTES.decode(token_ids)
    decoded = wakes[0]
    done.set()
    waking.join()
    assert encoded >= 10
    assert decoded - encoded >= 10


def test_a_prompt_that_cannot_fit_is_refused_with_its_characters() -> None:
    most = BYTES.most_chars(16)
    assert len(BYTES.encode("x" * 15, most_tokens=16)) == 16
    with pytest.raises(PromptTooLong, match=f"{most + 1} tokens.*is 16 tokens: shorten"):
        BYTES.encode("x" * most, most_tokens=16)
    with pytest.raises(
        PromptTooLong, match=f"{most + 1} characters.*is 16 tokens.*at most {most} characters"
    ):
        BYTES.encode("x" * (most + 1), most_tokens=16)
    with pytest.raises(PromptTooLong, match="messages has"):
        BYTES.encode_chat([{"role": "user", "content": "x" * most}], most_tokens=16)
