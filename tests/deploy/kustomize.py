"""Render a kustomization as `kubectl kustomize` does, so that tests need no program beside Python's packages.

Only what the folders below deploy/ use is known: resources, components, JSON patches, images, replicas, namespace.
Anything else is refused, so that nothing is left out silently.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]
KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
WORKLOADS = ("Deployment", "StatefulSet")
_KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "images", "replicas", "namespace",
}  # fmt: skip


def render(folder: Path) -> list[Manifest]:
    """Return the manifests that a kustomization makes."""
    return _apply(folder, [])


def manifests(file: Path) -> list[Manifest]:
    """Return the manifests of one file."""
    return [copy.deepcopy(each) for each in yaml.safe_load_all(file.read_text()) if each]


def container(workload: Manifest) -> Manifest:
    """Return the one container of a workload."""
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    return only


def _apply(folder: Path, above: list[Manifest]) -> list[Manifest]:
    """Return what is there already and what a folder adds, with the folder's changes of both."""
    asked: Mapping[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = sorted(asked.keys() - _KNOWN)
    assert not unknown, f"{folder}: this renderer does not know {', '.join(unknown)}"
    found = list(above)
    for name in asked.get("resources", ()):
        path = folder / name
        found += render(path.resolve()) if path.is_dir() else manifests(path)
    for name in asked.get("components", ()):
        found = _apply((folder / name).resolve(), found)
    for patch in asked.get("patches", ()):
        found = _patched(found, patch)
    for each in found:
        _set_namespace(each, asked.get("namespace"))
        if each["kind"] in WORKLOADS:
            _set_image(container(each), asked.get("images", ()))
            for replicas in asked.get("replicas", ()):
                if each["metadata"]["name"] == replicas["name"]:
                    each["spec"]["replicas"] = replicas["count"]
    return found


def _patched(found: list[Manifest], patch: Mapping[str, Any]) -> list[Manifest]:
    target = patch["target"]
    hits = [each for each in found if _identity(each) == (target["kind"], target["name"])]
    assert len(hits) == 1, f"{target} names {len(hits)} manifests"
    changed = jsonpatch.apply_patch(hits[0], yaml.safe_load(patch["patch"]))
    return [changed if each is hits[0] else each for each in found]


def _identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _set_namespace(manifest: Manifest, namespace: str | None) -> None:
    if namespace is None:
        return
    if manifest["kind"] == "Namespace":
        manifest["metadata"]["name"] = namespace
    else:
        manifest["metadata"]["namespace"] = namespace


def _set_image(container: Manifest, images: list[Mapping[str, str]]) -> None:
    for image in images:
        if container["image"].split(":")[0] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"
