"""A value is accepted or refused alike, in the same words, wherever it comes from: command line, file or Python."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from engine import LLM
from engine.base.backends import choose_backends
from engine.cluster.roles.role_parts import costs_of, security_of
from engine.config.__main__ import reference
from engine.config.access_config import AccessConfig
from engine.config.batches_config import BatchesConfig
from engine.config.cluster_config import ClusterConfig, PolicyName
from engine.config.command_line import BATCH_OPTIONS, SERVE_OPTIONS, batch_config, serve_config
from engine.config.config import BatchConfig, EngineConfig, LoraDtype, ServeConfig
from engine.config.http_config import HttpConfig
from engine.config.launch_config import LaunchConfig
from engine.config.option import Configuration, options_of
from engine.config.peer_config import PeerConfig
from engine.config.source_config import SourceConfig
from engine.config.tenants_config import TenantsConfig
from engine.errors import InvalidConfig
from model.config import AttentionChoice
from scheduler.cluster.cost.profile import Slo, to_json
from scheduler.cluster.policies import POLICIES
from tests.model.test_attention_choice import CPU, LLAMA
from transport.base import Address

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("--peer", "127.0.0.1:1", "--peer-plain")
TOKEN = {"LORASERVE_PEER_TOKEN": "x" * 16}


@dataclass(frozen=True)
class Value:
    """An option's key, what an operator writes, and the value of the configuration's field."""

    key: str
    written: str
    value: Any
    remedy: str = ""

    @property
    def flags(self) -> list[str]:
        return [f"--{self.key.replace('_', '-')}", self.written]


def owner_of(key: str) -> tuple[type[Configuration], str]:
    """The configuration that has the option, and its field."""
    owners: tuple[type[Configuration], ...] = (
        EngineConfig,
        ServeConfig,
        AccessConfig,
        PeerConfig,
        BatchConfig,
    )
    return next((owner, o.field) for owner in owners for o in options_of(owner) if o.key == key)


def by_line(value: Value, folder: Path) -> object:
    return serve_config([*PEERS, *value.flags], TOKEN)


def by_file(value: Value, folder: Path) -> object:
    file = folder / "serve.toml"
    many = any(option.many for option in SERVE_OPTIONS if option.key == value.key)
    written = json.dumps([value.written] if many else value.written)
    file.write_text(f"{value.key} = {written}\n")
    return serve_config([*PEERS, "--config", str(file)], TOKEN)


def by_class(value: Value, folder: Path) -> object:
    owner, field = owner_of(value.key)
    given: dict[str, Any] = {field: value.value}
    if owner is PeerConfig:
        given = {"addresses": (Address("127.0.0.1", 1),), "plain": True, "token": "x" * 16} | given
    return owner(**given)


def by_llm(value: Value, folder: Path) -> object:
    """The words of an LLM where its options are the engine's, which are refused before a model is read."""
    owner, field = owner_of(value.key)
    return LLM(**{field: value.value}) if owner is EngineConfig else by_class(value, folder)


Reader = Callable[[Value, Path], object]
SOURCES: tuple[Reader, ...] = (by_line, by_file, by_class)
NOWHERE = Path("/no/such/folder")

BAD = (
    Value("dtype", "foo", "foo", "give one of auto, float32, bfloat16, float16"),
    Value("dtype", "float64", "float64", "give one of auto, float32, bfloat16, float16"),
    Value("device", "tpu", "tpu", "give one of auto, cpu, cuda"),
    Value("quantization", "int4", "int4", "give one of none, int8, fp8"),
    Value("attention_backend", "flash", "flash", "give one of auto, torch, native, triton, flashinfer"),
    Value("lora_dtype", "float8", "float8", "give one of auto, float32, bfloat16, fp8"),
    Value("unified_memory", "perhaps", "perhaps", "give one of auto, on, off"),
    Value("max_num_seqs", "0", 0, "give a whole number from 1 to 2147483648"),
    Value("max_num_seqs", "many", "many", "give a whole number from 1 to 2147483648"),
    Value("max_num_batched_tokens", "-1", -1, "give a whole number from 1 to 2147483648"),
    Value("max_model_len", "0", 0, "give a whole number from 2 to 2147483648"),
    Value("max_model_len", "1", 1, "give a whole number from 2 to 2147483648"),
    Value("tensor_parallel_size", "0", 0, "give a whole number from 1 to 2147483648"),
    Value("block_size", "0", 0, "give a whole number from 1 to 2147483648"),
    Value("kv_cache_bytes", "0", 0, "give a size like 2GiB, 512MiB or a number of bytes"),
    Value("adapter_bytes", "0B", 0, "give a size like 2GiB, 512MiB or a number of bytes"),
    Value("adapter_patience_s", "-0.5", -0.5, "give a number of seconds from 0 to 1000000000"),
    Value("adapter_patience_s", "nan", math.nan, "give a number of seconds from 0 to 1000000000"),
    Value("model", " ", " ", "give a folder or a hub id"),
    Value("served_model_name", "", "", "give a text that is not empty"),
    Value("lora_dir", str(NOWHERE), NOWHERE, "there is no such folder: give one that exists"),
    Value("lora", f"poet={NOWHERE}", {"poet": NOWHERE}, "there is no such folder: give one that exists"),
    Value("host", " ", " ", "give a text that is not empty"),
    Value("port", "65536", 65536, "give a whole number from 0 to 65535"),
    Value("log_level", "loud", "loud", "give one of debug, info, warning"),
    Value("max_waiting", "0", 0, "give a whole number from 1 to 2147483648"),
    Value("drain_s", "-1", -1.0, "give a number of seconds from 0 to 1000000000"),
    Value("api_key", "open sesame", ("open sesame",), "give printable ASCII without spaces or commas"),
    Value("admin_key", "open sesame", ("open sesame",), "give printable ASCII without spaces or commas"),
    Value(
        "api_key_file", str(NOWHERE), NOWHERE, "it cannot be read (No such file or directory): give a file"
    ),
    Value(
        "cors_origins",
        "a.example",
        ("a.example",),
        "give an origin like https://app.example:8443, without a path, or *",
    ),
    Value(
        "cors_origins",
        "https://a.example/",
        ("https://a.example/",),
        "give an origin like https://app.example:8443, without a path, or *",
    ),
    Value("lora_root", str(NOWHERE), (NOWHERE,), "there is no such folder: give one that exists"),
    Value("peer_listen", "node:99999", Address("node", 99999), "give a whole number from 0 to 65535"),
    Value("peer_path", "rpc", "rpc", "give one of auto, ucx, stream"),
    Value("peer_pulls", "5", 5, "give a whole number from 1 to 4"),
    Value("peer_publish_bytes", "0", 0, "give a size like 2GiB, 512MiB or a number of bytes"),
    Value("peer_refresh_s", "-1", -1.0, "give a number of seconds from 0 to 1000000000"),
)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.key}={bad.written}")
def test_a_bad_value_is_refused_in_the_same_words_by_every_read(bad: Value, tmp_path: Path) -> None:
    told: set[str] = set()
    for read in (*SOURCES, by_llm):
        with pytest.raises(InvalidConfig) as refusal:
            read(bad, tmp_path)
        told.add(str(refusal.value))
    (words,) = told
    assert words.startswith(f"{bad.key}=")
    assert words.endswith(f" is not accepted: {bad.remedy}")
    assert bad.key in ("api_key", "admin_key") or str(bad.written).partition("=")[0].rstrip("B") in words
    assert "sesame" not in words


GOOD = (
    Value("dtype", "bfloat16", "bfloat16"),
    Value("lora_dtype", "fp8", "fp8"),
    Value("unified_memory", "off", "off"),
    Value("max_num_seqs", "7", 7),
    Value("kv_cache_bytes", "512MiB", 512 << 20),
    Value("adapter_patience_s", "0", 0.0),
    Value("adapter_cache_dir", "/no/folder/yet", Path("/no/folder/yet")),
    Value("lora_dir", "/", Path("/")),
    Value("lora", "poet=/", {"poet": Path("/")}),
    Value("model", "org/base", "org/base"),
    Value("port", "0", 0),
    Value("log_level", "debug", "debug"),
    Value("lora_root", "/", (Path("/"),)),
    Value("cors_origins", "https://a.example,*", ("https://a.example", "*")),
    Value("admin_key", "a, b", ("a", "b")),
    Value("peer_listen", "[::1]:7", Address("::1", 7)),
    Value("peer_path", "stream", "stream"),
    Value("peer_refresh_s", "0.5", 0.5),
)


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.key)
def test_a_good_value_is_the_same_by_every_read(good: Value, tmp_path: Path) -> None:
    owner, field = owner_of(good.key)
    found: list[object] = []
    for read in SOURCES:
        config = read(good, tmp_path)
        if isinstance(config, ServeConfig) and owner is not ServeConfig:
            parts = (config.engine, config.access, config.engine.peers)
            config = next(part for part in parts if isinstance(part, owner))
        found.append(getattr(config, field))
    assert found == [good.value] * len(SOURCES)


@pytest.mark.parametrize(
    "given",
    [
        {"max_num_seqs": True}, {"max_num_seqs": 2.0}, {"max_num_seqs": "3"}, {"max_num_seqs": None},
        {"adapter_patience_s": "1"}, {"adapter_patience_s": False}, {"kv_cache_bytes": "much"},
        {"progress": 1}, {"cuda_graphs": "yes"}, {"dtype": None}, {"dtype": 32}, {"lora_dir": 5},
        {"adapter_cache_dir": 5}, {"model": 5}, {"loras": {"poet": 5}}, {"loras": {5: "/"}}, {"loras": "poet"},
        {"loras": (("poet", Path("/")),)},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_is_refused_by_its_field(given: dict[str, Any]) -> None:
    ((field, _),) = given.items()
    with pytest.raises(
        InvalidConfig, match=f"^{'lora' if field == 'loras' else field}=.* is not accepted: give"
    ):
        LLM(**given)


def test_adapters_may_be_named_by_texts_in_python() -> None:
    assert EngineConfig(loras={"poet": "/"}).loras == {"poet": "/"}


def unknown(**options: Any) -> dict[str, Any]:
    """Options that a type checker would refuse already."""
    return options


def test_an_option_that_does_not_exist_is_answered_by_one_that_does() -> None:
    with pytest.raises(InvalidConfig, match=r"^max_num_seq=4 .*did you mean max_num_seqs\?"):
        LLM(**unknown(max_num_seq=4))
    with pytest.raises(InvalidConfig, match=r"^zzz=4 .*docs/options\.md lists them"):
        LLM(**unknown(zzz=4))


FORMER = {
    "shared_memory": ("unified_memory", "off"),
    "peer_door": ("peer_path", "stream"),
    "peer_lend_bytes": ("peer_publish_bytes", "1MiB"),
    "peer_review_s": ("peer_refresh_s", "0.5"),
}


@pytest.mark.parametrize("former", FORMER)
def test_a_former_name_is_accepted_with_one_line_of_warning(
    former: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, written = FORMER[former]
    flag, file = f"--{former.replace('_', '-')}", tmp_path / "serve.toml"
    file.write_text(f'{former} = "{written}"\n')
    expected = serve_config([*PEERS, *Value(name, written, None).flags], TOKEN)
    assert caplog.records == []
    assert serve_config([*PEERS, flag, written], TOKEN) == expected
    assert serve_config([*PEERS, "--config", str(file)], TOKEN) == expected
    new_flag = f"--{name.replace('_', '-')}"
    assert [record.getMessage() for record in caplog.records] == [
        f"{flag} is now called {new_flag}; the next release knows the new name only",
        f"{former} is now called {name}; the next release knows the new name only",
    ]
    with pytest.raises(InvalidConfig, match=f"^{former}='{written}' .*{name} is its new name and given too"):
        serve_config([*PEERS, flag, written, *Value(name, written, None).flags], TOKEN)


def test_a_former_name_is_accepted_by_keyword(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidConfig, match=r"^unified_memory='perhaps'"):
        LLM(**unknown(shared_memory="perhaps"))
    assert len(caplog.records) == 1


def test_help_shows_the_new_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_config(["--help"], {})
    told = capsys.readouterr().out
    formers = [option.former for option in SERVE_OPTIONS if option.former]
    assert {former.replace("-", "_") for former in formers} == FORMER.keys()
    assert [former for former in formers if former in told] == []


def test_every_field_but_a_configuration_is_an_option_of_one_name() -> None:
    for owner, inner in (
        (EngineConfig, {"peers", "sources"}),
        (SourceConfig, set[str]()),
        (ServeConfig, {"engine", "access", "http", "batches", "cluster", "launch", "tenants"}),
        (HttpConfig, set[str]()),
        (BatchesConfig, set[str]()),
        (PeerConfig, set[str]()),
        (AccessConfig, set[str]()),
        (ClusterConfig, set[str]()),
        (LaunchConfig, set[str]()),
        (TenantsConfig, set[str]()),
    ):
        assert {field.name for field in fields(owner)} == {o.field for o in options_of(owner)} | inner
    for options in (SERVE_OPTIONS, BATCH_OPTIONS):
        keys = [option.key for option in options]
        assert len(keys) == len(set(keys))


def test_a_batch_checks_its_options_as_well() -> None:
    with pytest.raises(InvalidConfig, match=r"^in_flight=0 .*whole number"):
        batch_config(["-i", "in", "-o", "out", "--in-flight", "0"])


@pytest.mark.parametrize("lora_dtype", get_args(LoraDtype))
def test_every_word_of_an_option_means_something(lora_dtype: LoraDtype) -> None:
    chosen = choose_backends(EngineConfig(lora_dtype=lora_dtype), LLAMA, LLAMA.dtype, CPU)
    assert chosen.attention in ("native", "torch")
    assert set(get_args(AttentionChoice)) == {"auto", "torch", "native", "triton", "flashinfer"}


def test_the_reference_of_all_options_is_current() -> None:
    """Run `python -m engine.config > docs/options.md` after a change of the options."""
    made = subprocess.run(
        [sys.executable, "-m", "engine.config"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert made == (ROOT / "docs/options.md").read_text()
    assert max(len(line) for line in made.splitlines()) <= 100


def test_the_reference_says_how_each_option_is_given() -> None:
    made = reference(options_of(ServeConfig))
    assert "\n## Server\n" in made
    keys = "\n- `--api-key KEY`, `api_key`, `LORASERVE_API_KEY`; no default.\n"
    assert keys in reference(options_of(AccessConfig))
    assert (
        "\n- `--max-waiting N`, `max_waiting`; default `256`.\n  Requests that may queue before 429.\n"
        in made
    )


def test_what_concerns_a_cluster_is_refused_where_there_is_none() -> None:
    for option, value in (
        ("zone", "a"),
        ("coordinator", "127.0.0.1:7"),
        ("profile", "node.json"),
        ("routers", "2"),
    ):
        with pytest.raises(InvalidConfig, match=rf"^{option.replace('-', '_')}=.* without a cluster"):
            serve_config([f"--{option}", value], {})
    assert serve_config(["--nodes", "2", "--routers", "2", "--slo-ttft-s", "1"], {}).cluster.routers == 2


def test_one_server_alone_promises_only_what_it_is_told_to() -> None:
    nothing, some = serve_config([], {}).cluster, serve_config(["--slo-ttft-s", "1"], {}).cluster
    assert (nothing.has_slo, nothing.slo) == (False, Slo(math.inf, math.inf))
    assert (some.has_slo, some.slo) == (True, Slo(1.0, math.inf))
    assert serve_config(["--slo-tbt-s", "1", "--profile", "node.json"], {}).cluster.slo == Slo(math.inf, 1.0)
    assert serve_config(["--nodes", "2", "--slo-tbt-s", "1"], {}).cluster.slo == Slo(2.0, 1.0)


def test_a_cluster_tells_costs_by_the_profile_it_is_given_and_by_its_own_slo(tmp_path: Path) -> None:
    shipped = costs_of(serve_config(["--nodes", "2", "--device", "cpu", "--slo-tbt-s", "0.5"], {}))
    assert shipped.profile.slo.tbt_s == 0.5
    own = tmp_path / "node.json"
    own.write_text(to_json(shipped.profile))
    given = costs_of(serve_config(["--nodes", "2", "--profile", str(own)], {}))
    assert given.model == shipped.model
    assert given.digest != shipped.digest
    for content in ("", "{}", "no profile"):
        own.write_text(content)
        with pytest.raises(InvalidConfig, match=r"^profile='.*scripts\.profile_node"):
            costs_of(serve_config(["--nodes", "2", "--profile", str(own)], {}))
    with pytest.raises(InvalidConfig, match=r"^profile='.*scripts\.profile_node"):
        costs_of(serve_config(["--nodes", "2", "--profile", str(tmp_path / "none.json")], {}))


def test_every_policy_that_an_operator_may_name_is_there() -> None:
    assert set(get_args(PolicyName)) == set(POLICIES)


def test_every_role_takes_the_members_token_and_needs_no_peers_of_its_own(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-sixteen")
    shared = ["--peer-token-file", str(token), "--peer-plain"]
    for role in (
        ["coordinator", "--cluster-listen", "127.0.0.1:7000"],
        ["router", "--coordinator", "127.0.0.1:7000"],
        ["node", "--coordinator", "127.0.0.1:7000", "--peer-listen", "127.0.0.1:7002"],
    ):
        config = serve_config(["--role", *role, *shared], {})
        assert security_of(config).token == "a-token-of-sixteen"
    far = serve_config(["--role", "router", "--coordinator", "10.0.0.1:7000", *shared], {})
    with pytest.raises(InvalidConfig, match=r"^coordinator='10.0.0.1:7000'.*--peer-tls-ca"):
        security_of(far)
    with pytest.raises(InvalidConfig, match=r"^nodes=2 .*leave out --role"):
        serve_config(["--role", "router", "--coordinator", "127.0.0.1:7000", "--nodes", "2"], {})


def test_a_file_that_asks_for_nodes_may_be_shared_with_the_processes_that_it_starts(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('nodes = 2\nslo_ttft_s = 3.0\nregistry_file = "names"\n')
    assert serve_config(["--config", str(file)], {}).cluster.nodes == 2
    line = ["--config", str(file), "--role", "node", "--coordinator", "127.0.0.1:7000", "--peer-plain"]
    started = serve_config(line, {"LORASERVE_PEER_TOKEN": "a-token-of-sixteen"}).cluster
    assert (started.nodes, started.slo_ttft_s, started.registry_file) == (None, 3.0, None)
    with pytest.raises(InvalidConfig, match=r"^registry_file='.*the coordinator keeps"):
        serve_config([*line, "--registry-file", "names"], {"LORASERVE_PEER_TOKEN": "a-token-of-sixteen"})
