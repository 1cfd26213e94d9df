"""What lies beside an adapter's weights is read, refused with the reason, and told to peers word for word."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import AdapterRefused
from lora.format.adapter_files import Flaw
from lora.format.companions import (
    NO_COMPANIONS,
    Companions,
    Vocabulary,
    parse_companions,
    read_companions,
    read_vocabulary,
    write_companions,
)
from tests.lora.cluster import BASE, Cluster
from tests.oracles.adapters import write_adapter


def write(folder: Path, **files: object) -> Path:
    """Write JSON files, by their names without the ending."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_with_weights_alone_has_none(tmp_path: Path) -> None:
    assert read_companions(tmp_path) == NO_COMPANIONS
    assert read_vocabulary(tmp_path) == Vocabulary()


def test_the_template_comes_from_its_own_file_or_the_tokenizers_configuration(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "one", "eos_token": "</s>"})
    assert read_companions(tmp_path) == Companions("one", "</s>")
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    write(tmp_path, tokenizer_config={"chat_template": several, "eos_token": {"content": "<|e|>"}})
    assert read_companions(tmp_path) == Companions("two", "<|e|>")
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_companions(tmp_path).chat_template == "three"


@pytest.mark.parametrize(("given", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, ())])
def test_end_tokens_come_from_the_generation_configuration(tmp_path: Path, given: Any, ids: Any) -> None:
    assert read_companions(write(tmp_path, generation_config={"eos_token_id": given})).eos_token_ids == ids


def test_the_tokens_that_files_name_are_listed_with_the_whole_tokenizer(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"9": {"content": "[PAD]"}}, "pad_token": "[PAD]"}
    write(tmp_path, added_tokens={"<|x|>": 8}, tokenizer_config=config)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert read_vocabulary(tmp_path) == Vocabulary((("<|x|>", 8), ("[PAD]", 9)), b"{}", "[PAD]")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": 5}},
        {"tokenizer_config": {"chat_template": [{"name": "other", "template": "x"}]}},
        {"tokenizer_config": {"eos_token": 5}},
        {"tokenizer_config": {"added_tokens_decoder": []}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"tokenizer_config": []},
        {"added_tokens": {"a": -1}},
        {"added_tokens": {"a": True}},
        {"generation_config": {"eos_token_id": "7"}},
        {"generation_config": {"eos_token_id": [1, None]}},
    ],
)
def test_files_that_say_nothing_sensible_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, **files)
    with pytest.raises(Flaw, match=next(iter(files))):
        _ = read_companions(tmp_path), read_vocabulary(tmp_path)


@given(
    st.builds(Companions, st.none() | st.text(), st.none() | st.text(), st.lists(st.integers()).map(tuple))
)
def test_what_is_written_for_peers_is_read_again(companions: Companions) -> None:
    written = write_companions(companions)
    assert parse_companions(written) == companions
    assert "\n" not in written


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"chat_template":5,"eos_token":null,"eos_token_ids":[]}',
        '{"chat_template": "a"}',
        "[" * 9999,
    ],
)
def test_what_a_peer_tells_wrongly_is_refused(text: str) -> None:
    with pytest.raises(Flaw, match="damaged"):
        parse_companions(text)


def test_a_peer_learns_them_with_the_name_and_follows_their_change(cluster: Cluster) -> None:
    owner = cluster.node()
    other = cluster.node(owner.transport.address)
    folder = write_adapter(cluster.root / "mine", BASE, 4, 1)
    owner.store.registry.load("a1", write(folder, generation_config={"eos_token_id": 3}))
    assert other.store.registry.companions("a1") == Companions(eos_token_ids=(3,))
    (folder / "chat_template.jinja").write_text("changed")
    owner.store.registry.load("a1", folder)
    other.store.refresher.refresh()
    assert other.store.registry.companions("a1") == Companions("changed", None, (3,))


def test_an_adapter_whose_companions_are_refused_is_refused_wherever_it_comes_from(cluster: Cluster) -> None:
    def refuse(companions: Companions, vocabulary: Vocabulary) -> None:
        if companions != NO_COMPANIONS or vocabulary != Vocabulary():
            raise Flaw("not with these")

    owner = cluster.node()
    other = cluster.node(owner.transport.address)
    folder = write_adapter(cluster.root / "mine", BASE, 4, 1)
    other.store.check_companions(refuse)
    other.store.registry.declare("declared", folder)
    owner.store.registry.load("remote", write(folder, generation_config={"eos_token_id": 3}))
    for ask in (
        lambda: other.store.registry.load("loaded", folder),
        lambda: other.store.registry.resolve("declared"),
        lambda: other.store.registry.companions("declared"),
        lambda: other.store.registry.resolve("remote"),
    ):
        with pytest.raises(AdapterRefused, match="not with these"):
            ask()
