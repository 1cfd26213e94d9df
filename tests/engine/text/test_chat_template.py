"""Chat templates render as transformers renders them, within limits whatever they do."""

import json
import subprocess
from pathlib import Path

import pytest

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.config.config import EngineConfig
from engine.errors import InvalidConfig
from engine.text.chat_template import ChatTemplate
from engine.text.template_renderer import BrokenTemplate, InvalidChat, TemplateRenderer
from engine.tokenizer import Tokenizer
from lora.format.adapter_files import Flaw
from lora.format.companions import Companions
from scheduler.request import InvalidParameter
from tests.engine.text.templates import CHATML, HOSTILE, MISTRAL, REAL
from tests.fakes.tokenizers import byte_tokenizer

TURNS = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "  <b>Grüße</b> & 'quotes' 🙂\n"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello {{ x }}"},
    {"role": "user", "content": "again a"},
]
CONVERSATIONS = [TURNS, TURNS[1:], TURNS[1:2], TURNS[:3], [{"role": "user", "content": ""}]]
HI = TURNS[1:2]
ENCODE = Tokenizer(byte_tokenizer()).encode
SURROGATE = "{{ '\\ud800' }}"
ONLY_ANSWERS = "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\\udfff' }}{% endif %}{% endfor %}"
SHORT_S, LITTLE_BYTES = 0.3, 1 << 28


@pytest.fixture(scope="module")
def renderer() -> TemplateRenderer:
    return TemplateRenderer(SHORT_S, LITTLE_BYTES)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("generates", [True, False])
def test_a_template_renders_as_transformers_renders_it(
    renderer: TemplateRenderer, name: str, generates: bool
) -> None:
    tokenizer = byte_tokenizer(REAL[name])
    template = ChatTemplate(REAL[name], dict(tokenizer.special_tokens_map), renderer)
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates)
        assert template.render(messages, generates).text == expected


@pytest.mark.parametrize("name", REAL)
def test_a_last_message_is_continued_where_transformers_continues_it(
    renderer: TemplateRenderer, name: str
) -> None:
    tokenizer = byte_tokenizer(REAL[name])
    template = ChatTemplate(REAL[name], dict(tokenizer.special_tokens_map), renderer)
    for content in ("Well, ", "<think>\nwell\n</think>\n\nHello", "  x \n", ""):
        messages = [*HI, {"role": "assistant", "content": content}]
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        except ValueError:
            with pytest.raises(InvalidChat, match="cannot be continued"):
                template.render_continued(messages)
        else:
            assert template.render_continued(messages).text == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_an_end_is_refused_and_the_next_one_renders(
    renderer: TemplateRenderer, name: str
) -> None:
    with pytest.raises(BrokenTemplate, match="chat template"):
        ChatTemplate(HOSTILE[name], {}, renderer).check(ENCODE)
    assert (
        ChatTemplate(CHATML, {}, renderer).render(HI, False).text
        == f"<|im_start|>user\n{HI[0]['content']}<|im_end|>\n"
    )


def test_what_a_template_says_in_refusing_is_passed_on(renderer: TemplateRenderer) -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""}, renderer)
    with pytest.raises(InvalidChat, match="roles must alternate"):
        template.render([*HI, *HI])
    template.check(ENCODE)


def test_a_text_that_is_too_long_is_measured_and_not_returned(renderer: TemplateRenderer) -> None:
    rendered = ChatTemplate(CHATML, {}, renderer).render(HI, most_chars=20)
    assert (rendered.text, rendered.most_chars) == (None, 20)
    assert rendered.length > 20


def test_a_renderer_that_is_dropped_ends_its_process() -> None:
    renderer = TemplateRenderer()
    ChatTemplate(CHATML, {}, renderer).check(ENCODE)
    assert renderer._process._worker is not None
    process: subprocess.Popen[bytes] = renderer._process._worker._process
    assert process.poll() is None
    del renderer
    assert process.poll() is not None


def test_a_renderer_whose_process_was_ended_starts_another() -> None:
    renderer = TemplateRenderer()
    template = ChatTemplate("{{ messages[0].content }}", {}, renderer)
    for _ in range(2):
        assert template.render(HI).text == HI[0]["content"]
        renderer.close()


@pytest.mark.parametrize("given", ["{{ messages[0].content }}!", "a.jinja", Path("a.jinja")])
def test_an_operators_template_replaces_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("model")
    Path("a.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer("model", EngineConfig(chat_template=given).chat_template)
    assert tokenizer.decode(tokenizer.encode_chat(HI)) == f"{HI[0]['content']}!"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("missing.jinja", "give a file"),
        ("folder", "no regular file"),
        ("bytes.jinja", "give a file"),
        ("{% for", "no Jinja template"),
        (HOSTILE["a long range"], "no template may"),
        (SURROGATE, "writes what the tokenizer cannot take"),
        (ONLY_ANSWERS, "writes what the tokenizer cannot take"),
    ],
)
def test_an_operators_template_that_is_none_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("model")
    Path("folder").mkdir()
    Path("bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidConfig, match=reason) as error:
        load_tokenizer("model", given)
    assert error.value.field == "chat_template"


def test_of_several_templates_a_model_has_its_default(tmp_path: Path) -> None:
    several = byte_tokenizer()
    several.chat_template = {"default": "{{ messages[0].content }}!", "tool_use": "{% for"}
    assert Tokenizer(several).encode_chat(HI) == Tokenizer(byte_tokenizer()).encode(
        f"{HI[0]['content']}!", False
    )
    several.chat_template = {"tool_use": "x"}
    several.save_pretrained(tmp_path)
    with pytest.raises(InvalidConfig, match=r"tool_use.*with --chat-template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [SURROGATE, "\ud800", ONLY_ANSWERS])
def test_a_template_that_writes_what_is_no_text_is_refused_with_its_model_or_adapter(
    tmp_path: Path, template: str
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(InvalidConfig, match=r"cannot take.*with --chat-template") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(Flaw, match="chat template writes what the tokenizer cannot take"):
        Tokenizer(byte_tokenizer()).of_adapter(Companions(chat_template=template))


def test_what_a_template_writes_is_not_put_down_to_the_messages() -> None:
    tokenizer = Tokenizer(byte_tokenizer("{{ messages[0].content | replace('x', '\\ud800') }}"))
    with pytest.raises(InvalidChat, match="the chat template makes no text of these messages"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidParameter, match="messages"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])
