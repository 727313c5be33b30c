"""The Kubernetes manifests: schemas take them, programs know the options in them, and pods have no rights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.command_lines import ROOT, faults, is_ours
from tests.deploy.node_configs import check_node_config
from tests.deploy.ports import documented_ports

FILES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.30", "1.34")
Manifest = dict[str, Any]


@cache
def manifests() -> list[tuple[str, Manifest]]:
    return [(path.name, one) for path in FILES for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def pods() -> Iterator[tuple[str, Manifest]]:
    for _, one in manifests():
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


PODS = dict(pods())


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_there_is_a_manifest_for_each_part() -> None:
    assert set(PODS) == {"trunk", "superlink", "gate", "north"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kubernetes_own_schema_takes_it(path: Path, version: str) -> None:
    for name, one in manifests():
        if name == path.name:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_schema_refuses_a_field_that_is_none() -> None:
    broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": [{"port": 1}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_rights(name: str) -> None:
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not any("hostPath" in volume for volume in pod["volumes"])


@pytest.mark.parametrize("name", PODS)
def test_its_programs_know_every_option(name: str) -> None:
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    for container in PODS[name]["containers"]:
        lines = [container["command"]]
        lines += [container[probe]["exec"]["command"] for probe in probes if "exec" in container.get(probe, {})]
        for line in lines:
            assert not is_ours(line) or faults(line) == []
        assert {"livenessProbe"} <= container.keys()


def test_a_sites_node_config_is_one() -> None:
    (container,) = PODS["north"]["containers"]
    (variable,) = container["env"]
    assert "--node-config=$(NODE_CONFIG)" in container["command"]
    check_node_config(variable["value"])


@pytest.mark.parametrize("name", PODS)
def test_no_secret_is_in_an_environment_and_each_volume_is_mounted(name: str) -> None:
    pod = PODS[name]
    for container in containers(pod):
        for variable in container.get("env", []):
            assert "valueFrom" not in variable
            assert not re.search(r"://[^/@]*:[^/@]*@", variable["value"])
    claims = [
        template["metadata"]["name"]
        for _, one in manifests()
        if one["metadata"]["name"] == name
        for template in one["spec"].get("volumeClaimTemplates", [])
    ]
    volumes = {volume["name"] for volume in pod["volumes"]} | set(claims)
    mounts = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
    assert mounts == volumes


def test_what_is_secret_lies_in_a_secret_and_no_manifest_holds_one() -> None:
    assert {one["kind"] for _, one in manifests()}.isdisjoint({"Secret"})
    for pod in PODS.values():
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440


@pytest.mark.parametrize("name", PODS)
def test_a_key_that_our_programs_read_is_a_copy_that_its_user_alone_can_read(name: str) -> None:
    pod = PODS[name]
    (container,) = pod["containers"]
    if container["command"][0] == "nginx":
        return
    (copying,) = pod["initContainers"]
    assert copying["command"] == ["sh", "-c", "install -m 0600 /secret/* /keys/"]
    told = " ".join([*container["command"], *(variable["value"] for variable in container["env"])])
    assert "/secret/" not in told
    assert re.search(r"/keys/[\w-]+\.key", told)


def test_policies_let_in_and_out_what_the_docs_tell_of() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for _, one in manifests() if one["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert "ingress" not in policies["site"], "nobody connects to a site"
    sources = [source for rule in policies["superlink"]["ingress"] for source in rule["from"]]
    assert sources == [{"podSelector": {"matchLabels": {"app": "gate"}}}], "sites come by the gate"
    ports = {
        port["port"]
        for policy in policies.values()
        for rule in (*policy.get("ingress", []), *policy.get("egress", []))
        for port in rule["ports"]
    }
    services = [one["spec"] for _, one in manifests() if one["kind"] == "Service"]
    served = {port["port"] for service in services for port in service.get("ports", [])}
    assert ports - {53} | served <= documented_ports()
    assert served <= ports


def test_one_state_has_one_process() -> None:
    for _, one in manifests():
        if one["kind"] in ("Deployment", "StatefulSet") and one["metadata"]["name"] != "gate":
            assert one["spec"]["replicas"] == 1
            if one["kind"] == "Deployment":
                assert one["spec"]["strategy"] == {"type": "Recreate"}
