"""Names at start: what was named is served or the start fails; what was found is served or said."""

import shutil
import threading
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.assembly.first_adapters import add_adapters
from engine.config.command_line import serve_config
from engine.demo.embedded import adapter_folders
from engine.errors import InvalidConfig
from engine.serve import USAGE_ERROR, main
from lora.adapter import is_name
from lora.errors import AdapterRefused, InvalidName, UnknownAdapter
from lora.format.folder_stamp import FolderStamp
from tests.lora.store_rig import StoreRig

REVERSE = adapter_folders()["reverse"]
BAD_NAMES = ["base", "a b", "é", "a/", "..", "x" * 129, ""]


@pytest.fixture
def rig(tmp_path: Path) -> StoreRig:
    made = StoreRig(tmp_path, 2)
    made.store.registry.reserve(("base",))
    return made


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_named_adapter_with_a_bad_name_ends_the_start(rig: StoreRig, name: str) -> None:
    with pytest.raises(InvalidName, match="choose another"):
        add_adapters(rig.store.registry, {name: rig.folder(1)}, None, {})
    assert rig.store.registry.names() == ()


@pytest.mark.parametrize("name", ["base", "a b", "é"])
def test_a_found_adapter_with_a_bad_name_is_passed_over_and_said(
    rig: StoreRig, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = tmp_path / "found"
    found.mkdir()
    rig.folder(1).rename(found / name)
    rig.folder(2).rename(found / "good")
    add_adapters(rig.store.registry, {}, found, {})
    assert rig.store.registry.names() == ("good",)
    assert f"{found / name} is passed over" in caplog.text
    assert "choose another" in caplog.text


def test_a_given_name_wins_over_a_found_one_and_that_is_said(
    rig: StoreRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = tmp_path / "found"
    found.mkdir()
    rig.folder(1).rename(found / "poet")
    given = rig.folder(2)
    add_adapters(rig.store.registry, {"poet": given}, found, {"poet": found / "poet"})
    assert [(entry.name, entry.folder) for entry in rig.store.registry.entries()] == [("poet", given)]
    assert f"{found / 'poet'} is passed over: the name is given to {given}" in caplog.text


def test_a_named_folder_that_is_broken_is_told(rig: StoreRig) -> None:
    folder = rig.folder(1)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterRefused, match=str(folder)):
        add_adapters(rig.store.registry, {"poet": folder}, None, {})


@pytest.mark.parametrize("name", ["demo", "a b"])
def test_a_server_does_not_start_with_a_bad_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", "--no-progress", "--lora", f"{name}={REVERSE}"]) == USAGE_ERROR
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert repr(name) in told


@pytest.mark.parametrize("name", ["demo", "a b"])
def test_offline_the_same_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        LLM(loras={name: REVERSE}, max_model_len=64, kv_cache_bytes=1 << 20)


@pytest.mark.parametrize("second", ["reverse", "sort"])
def test_a_name_given_twice_is_refused(second: str, tmp_path: Path) -> None:
    other = adapter_folders()[second]
    with pytest.raises(InvalidConfig, match=r"lora='x' .* given twice"):
        serve_config(["--lora", f"x={REVERSE}", "--lora", f"x={other}"], {})
    file = tmp_path / "serve.toml"
    file.write_text(f'lora = ["x={REVERSE}", "x={other}"]')
    with pytest.raises(InvalidConfig, match=r"lora='x' .* given twice"):
        serve_config(["--config", str(file)], {})


def test_a_flag_may_name_several_at_once() -> None:
    config = serve_config(["--lora", f"x={REVERSE}", f"y={REVERSE}", "--served-model-name", "a", "b"], {})
    assert config.engine.loras == {"x": REVERSE, "y": REVERSE}
    assert config.engine.served_model_name == ("a", "b")


def _link(folder: Path, base: Path) -> Path:
    (folder / "blobs").mkdir()
    (folder / "link").symlink_to(base)
    return folder / "link"


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, ("link",)), ("alias", ("alias",)), (("a", "org/b", "a"), ("a", "org/b"))],
)
def test_the_base_is_called_what_was_written(
    given: str | tuple[str, ...] | None, names: tuple[str, ...], tmp_path: Path
) -> None:
    model = _link(tmp_path, REVERSE.parent.parent / "base")
    llm = LLM(model, served_model_name=given, max_model_len=64, kv_cache_bytes=1 << 20)
    assert llm.engine.card.names == names
    prompt = llm.tokenizer.encode("garden")
    assert len(llm.generate([prompt] * len(names), adapters=list(names))) == len(names)
    llm.close()


def test_a_base_may_be_called_what_no_adapter_may(tmp_path: Path) -> None:
    model = tmp_path / "My model (größer)"
    model.symlink_to(REVERSE.parent.parent / "base")
    assert not is_name(model.name)
    llm = LLM(model, max_model_len=64, kv_cache_bytes=1 << 20)
    assert llm.engine.card.names == (model.name,)
    assert llm.generate(["garden"], adapters=[model.name])
    llm.close()


def test_a_base_without_a_printable_name_is_refused_with_the_option_that_gives_one(tmp_path: Path) -> None:
    model = tmp_path / "two\nlines"
    model.symlink_to(REVERSE.parent.parent / "base")
    with pytest.raises(InvalidConfig, match="give another with --served-model-name") as refusal:
        LLM(model, max_model_len=64, kv_cache_bytes=1 << 20)
    assert str(refusal.value).isprintable()
    llm = LLM(model, served_model_name="plain", max_model_len=64, kv_cache_bytes=1 << 20)
    assert llm.engine.card.names == ("plain",)
    llm.close()


def test_a_model_from_the_hub_is_called_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    base = REVERSE.parent.parent / "base"
    monkeypatch.setattr("engine.base.model_card.find_checkpoint", lambda model: base)
    llm = LLM("org/model", max_model_len=64, kv_cache_bytes=1 << 20)
    assert llm.engine.card.names == ("org/model",)
    llm.close()


def test_an_adapter_that_is_put_into_the_folder_later_is_served(tmp_path: Path) -> None:
    llm = LLM(lora_dir=tmp_path, lora_dir_poll_s=0.0, max_model_len=64, kv_cache_bytes=1 << 20)
    ask = [[{"role": "user", "content": "garden"}]]
    shutil.copytree(REVERSE, tmp_path / "later")
    assert llm.engine.watch is not None
    llm.engine.watch.scan()
    with pytest.raises(UnknownAdapter):
        llm.chat(ask, SamplingParams(temperature=0), adapters="later")
    llm.engine.watch.scan()
    (result,) = llm.chat(ask, SamplingParams(temperature=0), adapters="later")
    assert result.outputs[0].text == "nedrag"
    llm.close()


def test_a_folder_that_hangs_holds_up_neither_requests_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, looked = threading.Event(), threading.Event()

    def look(folder: Path) -> FolderStamp:
        looked.set()
        hung.wait(60)
        raise OSError

    shutil.copytree(REVERSE, tmp_path / "poet")
    made = LLM(lora_dir=tmp_path, lora_dir_poll_s=0.0, max_model_len=64, kv_cache_bytes=1 << 20)
    assert made.engine.watch is not None
    made.generate(["x"], SamplingParams(max_tokens=1), adapters="poet")
    monkeypatch.setattr("lora.store.folder_watch.folder_stamp", look)
    made.engine.watch.start(0.001)
    assert looked.wait(60)
    made.generate(["x"], SamplingParams(max_tokens=1), adapters="poet")
    made.close()
    assert not hung.is_set()
    hung.set()
