"""Keys come from texts, files and the environment; what would open a server by mistake is refused at start."""

from pathlib import Path

import pytest

from engine.config.access_config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, AccessConfig, key_name
from engine.config.command_line import serve_config
from engine.errors import InvalidConfig


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("\ufefffirst\n\n  second  \r\nthird")
    return file


def access(*arguments: str, **environ: str) -> AccessConfig:
    return serve_config(arguments, environ).access


def test_keys_are_repeated_or_separated_by_commas(tmp_path: Path) -> None:
    assert access("--api-key", "a,b", "--api-key", "c").read_api_keys() == ("a", "b", "c")
    assert access(**{API_KEY_VARIABLE: "a, b", ADMIN_KEY_VARIABLE: "c"}).read_api_keys() == ("a", "b")
    assert access(**{ADMIN_KEY_VARIABLE: "c"}).read_admin_keys() == ("c",)
    file = tmp_path / "serve.toml"
    file.write_text('api_key = "a,b"\nadmin_key = ["c", "d,e"]')
    config = access("--config", str(file))
    assert (config.api_keys, config.admin_keys) == (("a", "b"), ("c", "d", "e"))


def test_a_file_of_keys_comes_on_top(key_file: Path) -> None:
    config = access("--api-key", "zero", "--api-key-file", str(key_file))
    assert config.read_api_keys() == ("zero", "first", "second", "third")
    assert access("--admin-key-file", str(key_file)).read_admin_keys() == ("first", "second", "third")


@pytest.mark.parametrize("content", ["", "\n \n", "two words", "a,b", "é"])
@pytest.mark.parametrize("option", ["api_key_file", "admin_key_file"])
def test_a_file_without_a_usable_key_is_refused_and_not_shown(
    option: str, content: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(InvalidConfig) as refusal:
        AccessConfig(**{option: file})
    told = str(refusal.value)
    assert told.startswith(f"{option}={str(file)!r}")
    assert "one key a line" in told or "write one a line" in told
    assert not content.strip() or content not in told


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--api-key", "same", "--admin-key", "other,same"], "admin_key"),
        (["--admin-key", "key", "--allow-admin-without-key"], "allow_admin_without_key"),
        (["--tls-cert", __file__], "tls_key"),
        (["--tls-key", __file__], "tls_cert"),
        (["--api-key", "a,,b"], "api_key"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments: list[str], field: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        access(*arguments)
    assert refusal.value.field == field
    assert "same" not in str(refusal.value)


def test_no_key_is_shown_by_a_configuration() -> None:
    assert "sesame" not in repr(serve_config(["--api-key", "sesame1", "--admin-key", "sesame2"], {}))


def test_a_tenants_weight_is_that_of_an_api_key_by_its_name() -> None:
    name = key_name("sesame")
    asked = ["--nodes", "2", "--api-key", "sesame,other"]
    config = serve_config([*asked, "--tenant-weight", f"{name}=2.5"], {})
    assert config.cluster.tenant_weights == {name: 2.5}
    for weights, value in (
        (["00000000=2"], "no API key has that name"),
        ([f"{name}=0"], "weight from"),
        ([f"{name}=nan"], "weight from"),
        ([name], "weight from"),
        (["sesame=2"], "weight from"),
        ([f"{name}=1", f"{name}=2"], "given twice"),
    ):
        options = [word for weight in weights for word in ("--tenant-weight", weight)]
        with pytest.raises(InvalidConfig, match=value) as refusal:
            serve_config([*asked, *options], {})
        assert refusal.value.field in ("tenant_weight", "tenant_weights")
    alone = serve_config(["--api-key", "sesame", "--tenant-weight", f"{name}=2"], {})
    assert alone.cluster.tenant_weights == {name: 2.0}
