"""The manifests are what Kubernetes takes, and what they say of the program is true."""

import functools
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from kubernetes_validate.utils import schema_contents

from engine.api.guard import _PERMISSIONS
from engine.api.keys import Permission
from engine.config.command_line import serve_config
from engine.config.config import ServeConfig
from tests.deploy.kustomize import KUBERNETES, WORKLOADS, Manifest, container, render
from tests.docs.pages import read_page

OVERLAYS = ("cpu-demo", "gpu")
FOLDERS = ("base", "overlays/cpu-demo", "overlays/gpu", "rdma")
VERSIONS = ("1.30", "1.37")
CUSTOM = ("monitoring.coreos.com/", "inference.networking.k8s.io/", "gateway.networking.k8s.io/")
LEAVE_AND_CLOSE_S = 15
COMPONENT, NAME = "app.kubernetes.io/component", "app.kubernetes.io/name"


@pytest.fixture(scope="module", params=FOLDERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """What one of the folders makes; `rdma` is the gpu overlay with that component."""
    if request.param != "rdma":
        return render(KUBERNETES / request.param)
    copied = tmp_path_factory.mktemp("rdma") / "kubernetes"
    shutil.copytree(KUBERNETES, copied)
    file = copied / "overlays" / "gpu" / "kustomization.yaml"
    asked = yaml.safe_load(file.read_text())
    asked["components"].append("../../components/rdma")
    file.write_text(yaml.safe_dump(asked))
    return render(file.parent)


def workloads(found: list[Manifest]) -> dict[str, Manifest]:
    """The workloads by what they are in a cluster."""
    return {each["metadata"]["labels"][COMPONENT]: each for each in found if each["kind"] in WORKLOADS}


def of_kind(found: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in found if each["kind"] == kind]


def secret_keys() -> dict[str, set[str]]:
    """The Secrets and their keys, as the page makes them."""
    page = re.sub(r"\\\n\s*", "", read_page("docs/deploy.md").block_below("The secrets"))
    made = re.findall(r"create secret generic (\S+) (.*)", page)
    return {name: {Path(file).name for file in re.findall(r"--from-file=(\S+)", rest)} for name, rest in made}


def configured(workload: Manifest, root: Path) -> ServeConfig:
    """What the server makes of a container's arguments, with the volumes laid out below `root`."""
    spec, only = workload["spec"]["template"]["spec"], container(workload)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in only["volumeMounts"]:
        folder = root / mount["mountPath"].lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for key in secret_keys().get(volumes[mount["name"]].get("secret", {}).get("secretName"), ()):
            (folder / key).write_text(key.ljust(32, "x"))
    for folder in ("base", "adapters"):
        (root / "models" / folder).mkdir(parents=True, exist_ok=True)
    given = {"POD_NAME": "loraserve-0", "POD_IP": "10.1.2.3", "ZONE": ""}
    arguments: list[str] = []
    for written in only["args"]:
        names = set(re.findall(r"\$\((\w+)\)", written))
        assert names <= {each["name"] for each in only.get("env", ())}
        for name in names:
            written = written.replace(f"$({name})", given[name])
        arguments.append(re.sub(r"=(/\w+)", rf"={root}\1", written))
    return serve_config(arguments, {})


@functools.cache
def schema(filename: str, desired_version: str) -> Any:
    """What the validator reads from a file, for each manifest anew; it changes nothing in it."""
    return schema_contents(filename, desired_version)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_manifest(
    found: list[Manifest], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schema)
    checked = [each for each in found if not each["apiVersion"].startswith(CUSTOM)]
    assert len(checked) > 12
    for each in checked:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_renderer_agrees_with_kubectl(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl to compare with")
    folder = KUBERNETES / "overlays" / overlay
    told = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)

    def key(each: Manifest) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    assert sorted(render(folder), key=key) == sorted(yaml.safe_load_all(told.stdout), key=key)


def test_every_command_line_is_one_that_the_server_takes(found: list[Manifest], tmp_path: Path) -> None:
    roles = {name: configured(each, tmp_path).cluster.role for name, each in workloads(found).items()}
    assert roles == {"coordinator": "coordinator", "node": "node", "router": "router"}


def test_the_ports_of_containers_services_and_probes_are_those_that_the_server_opens(
    found: list[Manifest], tmp_path: Path
) -> None:
    open_at: dict[str, dict[str, int]] = {}
    for name, workload in workloads(found).items():
        only, config = container(workload), configured(workload, tmp_path)
        opened = {"http": config.port}
        if config.cluster.cluster_listen is not None:
            opened["members" if name == "coordinator" else "link"] = config.cluster.cluster_listen.port
        if name == "node":
            assert config.engine.peers.listen is not None
            opened["peer"] = config.engine.peers.listen.port
        assert {port["name"]: port["containerPort"] for port in only["ports"]} == opened
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if (probe := only.get(kind)) is not None:
                assert probe["httpGet"]["port"] == "http"
                assert _PERMISSIONS.get(probe["httpGet"]["path"]) is Permission.NOTHING
        open_at[name] = opened
    for service in of_kind(found, "Service"):
        opened = open_at[service["spec"]["selector"][COMPONENT]]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= opened.keys()


def test_members_reach_the_coordinator_by_its_service(found: list[Manifest], tmp_path: Path) -> None:
    ports = {
        (each["metadata"]["name"], port["port"])
        for each in of_kind(found, "Service")
        for port in each["spec"]["ports"]
    }
    for name in ("node", "router"):
        address = configured(workloads(found)[name], tmp_path).cluster.coordinator
        assert address is not None
        assert (address.host, address.port) in ports


@pytest.mark.parametrize("name", ["coordinator", "router"])
def test_who_is_not_ready_is_not_restarted_for_it(found: list[Manifest], name: str) -> None:
    only = container(workloads(found)[name])
    assert only["livenessProbe"]["httpGet"]["path"] == "/version"
    assert only["readinessProbe"]["httpGet"]["path"] == "/health"


def test_there_is_time_to_drain(found: list[Manifest], tmp_path: Path) -> None:
    for name, drains in (("node", 2), ("router", 1)):
        workload = workloads(found)[name]
        stop_s = (
            container(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        )
        needed = stop_s + drains * configured(workload, tmp_path).drain_s + LEAVE_AND_CLOSE_S
        assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= needed


def test_all_are_told_the_same_of_the_cluster(found: list[Manifest], tmp_path: Path) -> None:
    made = workloads(found)
    told = {name: configured(workload, tmp_path).cluster for name, workload in made.items()}
    assert {told["router"].routers, told["coordinator"].routers} == {made["router"]["spec"]["replicas"]}
    assert len({(each.slo_ttft_s, each.slo_tbt_s) for each in told.values()}) == 1


def test_there_is_one_coordinator_and_its_catalogue_outlives_it(
    found: list[Manifest], tmp_path: Path
) -> None:
    coordinator = workloads(found)["coordinator"]
    assert coordinator["spec"]["replicas"] == 1
    assert coordinator["spec"]["strategy"] == {"type": "Recreate"}
    file = configured(coordinator, tmp_path).cluster.registry_file
    assert file is not None
    (mount,) = (
        each
        for each in container(coordinator)["volumeMounts"]
        if file.parent == tmp_path / each["mountPath"].lstrip("/")
    )
    volumes = {each["name"]: each for each in coordinator["spec"]["template"]["spec"]["volumes"]}
    claim = volumes[mount["name"]]["persistentVolumeClaim"]["claimName"]
    assert claim in {each["metadata"]["name"] for each in of_kind(found, "PersistentVolumeClaim")}


def test_secrets_are_files_that_only_their_group_reads(found: list[Manifest]) -> None:
    for workload in workloads(found).values():
        only, spec = container(workload), workload["spec"]["template"]["spec"]
        assert not any("secretKeyRef" in each.get("valueFrom", {}) for each in only.get("env", ()))
        assert "envFrom" not in only
        assert not any(each.startswith(("--api-key=", "--admin-key=")) for each in only["args"])
        secrets = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
        assert {each["secretName"] for each in secrets} <= secret_keys().keys()
        assert {each["defaultMode"] for each in secrets} == {0o440}
        assert spec["securityContext"]["fsGroup"]


def test_containers_have_no_privilege(found: list[Manifest]) -> None:
    for workload in workloads(found).values():
        spec, only = workload["spec"]["template"]["spec"], container(workload)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is False
        assert only["securityContext"]["readOnlyRootFilesystem"]
        assert only["securityContext"]["allowPrivilegeEscalation"] is False
        assert only["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert {"requests", "limits"} <= only["resources"].keys()


def test_budgets_and_zones_are_those_of_pods_that_exist(found: list[Manifest]) -> None:
    made = workloads(found)
    labels = {name: each["spec"]["template"]["metadata"]["labels"] for name, each in made.items()}
    budgets = [each["spec"]["selector"]["matchLabels"] for each in of_kind(found, "PodDisruptionBudget")]
    assert sorted(each[COMPONENT] for each in budgets) == ["node", "router"]
    assert all(each in labels.values() for each in budgets)
    for name in ("node", "router"):
        spread = made[name]["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert "topology.kubernetes.io/zone" in {each["topologyKey"] for each in spread}
        assert all(each["labelSelector"]["matchLabels"] == labels[name] for each in spread)


def test_the_network_lets_through_what_the_cluster_says_and_nothing_else() -> None:
    found = render(KUBERNETES / "base")
    policies = [each["spec"] for each in of_kind(found, "NetworkPolicy")]
    pods = {name: {NAME: "loraserve", COMPONENT: name} for name in ("coordinator", "node", "router")}
    pods["stranger"] = {NAME: "other"}
    ports = (7000, 7001, 7002, 8000)
    passing = {
        (source, target, port)
        for source, target, port in itertools.product(pods, pods, ports)
        if target != "stranger" and lets_through(policies, pods[source], pods[target], port)
    }
    assert passing == {
        ("node", "coordinator", 7000),
        ("router", "coordinator", 7000),
        ("router", "node", 7001),
        ("node", "node", 7002),
        ("stranger", "router", 8000),
    }


def lets_through(policies: list[Manifest], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether a packet passes the policies of both ends, of one namespace."""
    return allows(policies, "Ingress", target, source, port) and allows(
        policies, "Egress", source, target, port
    )


def allows(policies: list[Manifest], way: str, pod: dict[str, str], other: dict[str, str], port: int) -> bool:
    chosen = [each for each in policies if way in each["policyTypes"] and selects(each["podSelector"], pod)]
    rules = [rule for policy in chosen for rule in policy.get(way.lower(), ())]
    end = "from" if way == "Ingress" else "to"
    return not chosen or any(
        any(selects(each["podSelector"], other) for each in rule.get(end, ()) if "podSelector" in each)
        or end not in rule
        for rule in rules
        if port in {each["port"] for each in rule.get("ports", ({"port": port},))}
    )


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )
