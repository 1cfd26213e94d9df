"""The example of ordinary servers behind a gateway fits the Gateway API inference extension and the server."""

import kubernetes_validate
import pytest

from engine.config.command_line import serve_config
from tests.deploy.kustomize import KUBERNETES, Manifest, container, render

NATIVE = {"v1", "apps/v1", "networking.k8s.io/v1"}
CLOSE_S = 15


@pytest.fixture(scope="module")
def found() -> dict[str, Manifest]:
    """The example's manifests, by kind."""
    made = render(KUBERNETES / "inference-pool")
    by_kind = {each["kind"]: each for each in made}
    assert len(by_kind) == len(made)
    return by_kind


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_takes_what_is_its_own(found: dict[str, Manifest], version: str) -> None:
    own = {kind for kind, each in found.items() if each["apiVersion"] in NATIVE}
    assert own == {"Namespace", "Deployment", "NetworkPolicy"}
    for kind in own:
        kubernetes_validate.validate(found[kind], version, strict=True)


def test_the_pool_is_of_the_pods_and_the_port_that_they_serve(found: dict[str, Manifest]) -> None:
    pods, pool = found["Deployment"]["spec"]["template"], found["InferencePool"]
    config = serve_config(container(found["Deployment"])["args"], {})
    assert config.cluster.role == "single"
    assert config.cluster.nodes is None
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"]["selector"] == {"matchLabels": pods["metadata"]["labels"]}
    assert pool["spec"]["targetPorts"] == [{"number": config.port}]
    assert pool["spec"]["endpointPickerRef"]["port"]["number"] == 9002


def test_the_route_leads_to_the_pool_and_to_nothing_that_administers(found: dict[str, Manifest]) -> None:
    (rule,) = found["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    pool = found["InferencePool"]
    assert backend == {
        "group": pool["apiVersion"].partition("/")[0],
        "kind": "InferencePool",
        "name": pool["metadata"]["name"],
    }
    paths = {each["path"]["value"] for each in rule["matches"]}
    assert paths == {"/v1/chat/completions", "/v1/completions", "/v1/models"}


def test_only_labelled_pods_reach_servers_that_ask_for_no_key(found: dict[str, Manifest]) -> None:
    policy, pods = found["NetworkPolicy"]["spec"], found["Deployment"]["spec"]["template"]
    assert policy["podSelector"] == {"matchLabels": pods["metadata"]["labels"]}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    (source,) = rule["from"]
    assert source["podSelector"]["matchLabels"] == {"loraserve.io/may-ask": "true"}
    assert [each["port"] for each in rule["ports"]] == [8000]


def test_there_is_time_to_drain(found: dict[str, Manifest]) -> None:
    only, spec = container(found["Deployment"]), found["Deployment"]["spec"]["template"]["spec"]
    stop_s = only["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= stop_s + serve_config(only["args"], {}).drain_s + CLOSE_S


def test_containers_have_no_privilege(found: dict[str, Manifest]) -> None:
    spec = found["Deployment"]["spec"]["template"]["spec"]
    security = container(found["Deployment"])["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    assert security["readOnlyRootFilesystem"]
    assert security["capabilities"]["drop"] == ["ALL"]
