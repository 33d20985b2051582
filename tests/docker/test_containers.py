"""The shipped container files keep their promises, and the checks would notice if they did not."""

from __future__ import annotations

import copy
import json
import re
import runpy
import shlex
import socket
import ssl
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hardening import (
    compose_service_faults,
    dockerfile_faults,
    egress_faults,
    image,
    pod_faults,
    seconds,
)

import fedmed.hospital
from fedmed.audit.log import AuditLog
from fedmed.cli.main import parser
from fedmed.hospital.rules import Operation
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
HEALTH = runpy.run_path(str(DOCKER / "health"))
TEMPLATE = tomllib.loads(Path(fedmed.hospital.__file__).with_name("site.toml").read_text())
DRAIN = max(Operation().drain_seconds, TEMPLATE["operation"]["drain_seconds"])

Change = Callable[[dict[str, Any]], object]


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return found


def manifests(name: str) -> dict[str, dict[str, Any]]:
    text = (DOCKER / "kubernetes" / name).read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pod(name: str) -> dict[str, Any]:
    found = manifests(name)
    if "Pod" in found:
        return found["Pod"]["spec"]
    return found["StatefulSet"]["spec"]["template"]["spec"]


SERVICES = [
    ("coordinator.compose.yaml", "coordinator", 1, 0.0),
    ("site.compose.yaml", "site", 0, DRAIN),
    ("compose.yaml", "coordinator", 0, 0.0),
    ("compose.yaml", "site-1", 0, DRAIN),
    ("compose.yaml", "site-2", 0, DRAIN),
    ("compose.yaml", "site-3", 0, DRAIN),
]
PODS = [
    ("coordinator.yaml", 1, 0.0),
    ("site.yaml", 0, DRAIN),
    ("coordinator-setup.yaml", 0, 0.0),
    ("site-setup.yaml", 0, 0.0),
]


@pytest.mark.parametrize(("name", "service", "ports", "drain"), SERVICES)
def test_services_are_hardened(name, service, ports, drain):
    found = compose(name)["services"][service]
    assert compose_service_faults(found, ports=ports, drain=drain) == set()


def test_the_demos_set_up_is_hardened_and_runs_once():
    setup = compose("compose.yaml")["services"]["setup"]
    assert compose_service_faults(setup, ports=0, drain=0.0) == {"restart"}


def test_the_demo_has_three_sites_and_no_way_out():
    demo = compose("compose.yaml")
    assert {s for s in demo["services"] if s.startswith("site-")} == {"site-1", "site-2", "site-3"}
    assert demo["networks"] == {"study": {"internal": True}}
    assert all(s["networks"] == ["study"] for s in demo["services"].values())


def test_a_site_sees_its_own_folder_only():
    for number in "123":
        service = compose("compose.yaml")["services"][f"site-{number}"]
        assert service["volumes"] == [f"${{DEMO}}/site-{number}:/fedmed"]


def test_images_of_patients_are_only_read():
    mounts = compose("site.compose.yaml")["services"]["site"]["volumes"]
    assert [m.get("read_only") for m in mounts if m["target"] == "/data"] == [True]
    for name in ("site.yaml", "site-setup.yaml"):
        container = pod(name)["containers"][0]
        assert [m["readOnly"] for m in container["volumeMounts"] if m["mountPath"] == "/data"] == [
            True
        ]


def test_the_gpu_file_adds_a_gpu_and_nothing_else():
    added = compose("site-gpu.compose.yaml")
    assert list(added) == ["services"]
    assert list(added["services"]) == ["site"]
    assert set(added["services"]["site"]) == {"image", "deploy"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.update(user="0:0"), "root"),
        (lambda s: s.pop("user"), "root"),
        (lambda s: s.update(read_only=False), "writable root"),
        (lambda s: s.update(cap_drop=["NET_RAW"]), "capabilities"),
        (lambda s: s.update(cap_add=["SYS_ADMIN"]), "capabilities"),
        (lambda s: s.pop("security_opt"), "privileges"),
        (lambda s: s["security_opt"].append("seccomp:unconfined"), "privileges"),
        (lambda s: s.update(privileged=True), "privileged"),
        (lambda s: s.update(network_mode="host"), "host namespace"),
        (lambda s: s.update(pid="host"), "host namespace"),
        (lambda s: s.update(devices=["/dev/mem"]), "devices"),
        (lambda s: s["volumes"].append("/var/run/docker.sock:/s"), "socket"),
        (lambda s: s.update(tmpfs=["/tmp"]), "tmp"),
        (lambda s: s.pop("tmpfs"), "tmp"),
        (lambda s: s.pop("mem_limit"), "memory"),
        (lambda s: s.pop("pids_limit"), "pids"),
        (lambda s: s.update(ports=["8080:8080"]), "ports"),
        (lambda s: s.update(expose=["9000"]), "ports"),
        (lambda s: s.update(restart="no"), "restart"),
        (lambda s: s.pop("stop_grace_period"), "grace"),
        (lambda s: s.update(stop_grace_period=f"{int(DRAIN)}s"), "grace"),
        (lambda s: s.pop("command"), "no command"),
        (lambda s: s.update(environment={"SITE_PASSWORD": "x"}), "secret"),
        (lambda s: s.update(command=["fedmed", "--token", "x"]), "secret"),
    ],
)
def test_a_breach_in_a_compose_file_is_seen(change: Change, fault):
    service = copy.deepcopy(compose("site.compose.yaml")["services"]["site"])
    change(service)
    assert fault in compose_service_faults(service, ports=0, drain=DRAIN)


def test_a_coordinator_with_a_second_port_is_seen():
    service = compose("coordinator.compose.yaml")["services"]["coordinator"]
    service["ports"].append("9000:9000")
    assert "ports" in compose_service_faults(service, ports=1, drain=0.0)


@pytest.mark.parametrize(("name", "ports", "drain"), PODS)
def test_pods_meet_the_restricted_standard(name, ports, drain):
    assert pod_faults(pod(name), ports=ports, drain=drain) == set()


def _security(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = spec["containers"][0]["securityContext"]
    return found


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: p["securityContext"].update(runAsNonRoot=False), "root"),
        (lambda p: p["securityContext"].update(runAsUser=0), "root"),
        (lambda p: p["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda p: p["securityContext"].update(fsGroupChangePolicy="Always"), "key files"),
        (lambda p: p.pop("automountServiceAccountToken"), "service account"),
        (lambda p: p.update(hostNetwork=True), "host namespace"),
        (lambda p: p.update(hostPID=True), "host namespace"),
        (lambda p: p["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "host path"),
        (lambda p: p.update(terminationGracePeriodSeconds=int(DRAIN)), "grace"),
        (lambda p: p.update(initContainers=[{"name": "x"}]), "init containers"),
        (lambda p: _security(p).pop("allowPrivilegeEscalation"), "privileges"),
        (lambda p: _security(p).update(privileged=True), "privileged"),
        (lambda p: _security(p).update(readOnlyRootFilesystem=False), "writable root"),
        (lambda p: _security(p).update(capabilities={"add": ["NET_RAW"]}), "capabilities"),
        (lambda p: _security(p).update(runAsUser=0), "container overrides"),
        (lambda p: p["containers"][0]["resources"]["limits"].pop("memory"), "limits"),
        (lambda p: p["containers"][0].update(ports=[{"containerPort": 80}]), "ports"),
        (
            lambda p: p["containers"][0].update(env=[{"name": "API_KEY", "value": "x"}]),
            "secret",
        ),
    ],
)
def test_a_breach_in_a_pod_is_seen(change: Change, fault):
    spec = copy.deepcopy(pod("site.yaml"))
    change(spec)
    assert fault in pod_faults(spec, ports=0, drain=DRAIN)


def test_the_cluster_is_told_to_refuse_other_pods():
    found = manifests("namespace.yaml")
    labels = found["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found["NetworkPolicy"]["spec"] == {
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": [],
    }  # fmt: skip


def test_a_sites_pod_reaches_its_coordinator_and_nobody_reaches_it():
    found = manifests("site.yaml")
    assert egress_faults(found["NetworkPolicy"]) == set()
    assert "Service" not in found


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.update(policyTypes=["Ingress"]), "types"),
        (lambda s: s.update(ingress=[{}]), "ingress"),
        (lambda s: s["egress"].append({}), "egress ports"),
        (lambda s: s["egress"].append({"ports": [{"port": 443}]}), "egress ports"),
        (
            lambda s: s["egress"][0]["to"].append({"ipBlock": {"cidr": "0.0.0.0/0"}}),
            "egress addresses",
        ),
    ],
)
def test_a_hole_in_the_network_policy_is_seen(change: Change, fault):
    policy = copy.deepcopy(manifests("site.yaml")["NetworkPolicy"])
    change(policy["spec"])
    assert fault in egress_faults(policy)


def test_the_coordinators_pod_is_reached_on_one_port():
    found = manifests("coordinator.yaml")
    spec = found["NetworkPolicy"]["spec"]
    assert spec["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    assert spec["egress"] == []
    assert [p["port"] for p in found["Service"]["spec"]["ports"]] == [8443]


@pytest.mark.parametrize("name", ["coordinator.yaml", "site.yaml"])
def test_policies_services_and_pods_name_the_same_labels(name):
    found = manifests(name)
    state = found["StatefulSet"]["spec"]
    labels = state["template"]["metadata"]["labels"]
    assert state["replicas"] == 1
    assert state["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    if "Service" in found:
        assert found["Service"]["spec"]["selector"] == labels
    volumes = state["template"]["spec"]["volumes"]
    claims = [v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes]
    assert found["PersistentVolumeClaim"]["metadata"]["name"] in claims


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["coordinator", "site"])
def test_images_are_hardened(target, variant):
    assert dockerfile_faults(DOCKERFILE, target, variant) == set()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ARG BASE\n", "ARG BASE=debian:latest\n", "base"),
        ("FROM base AS installed", "FROM python:3.11 AS installed", "unknown base"),
        ("USER 10001:10001", "USER root", "root"),
        ("USER 10001:10001\n", "", "root"),
        ('CMD ["fedmed", "site", "join"]', "CMD fedmed site join", "shell form"),
        ('ENTRYPOINT ["tini", "--"]', 'ENTRYPOINT ["sh", "-c"]', "init"),
        ("HEALTHCHECK --interval", "LABEL x=", "health"),
        ("--require-hashes ", "", "hashes"),
        ("--no-index ", "", "hashes"),
        ("ENV FEDMED_SITE=/fedmed/site", "EXPOSE 9000", "ports"),
        ("MPLCONFIGDIR=/tmp/", "MPLCONFIGDIR=/root/", "home"),
        ("WORKDIR /fedmed", "VOLUME /fedmed", "volume"),
        ("ENV FEDMED_SITE=", "ENV SITE_TOKEN=", "secret"),
    ],
)
def test_a_breach_in_the_dockerfile_is_seen(old, new, fault):
    assert old in DOCKERFILE
    assert fault in dockerfile_faults(DOCKERFILE.replace(old, new), "site", "cpu")


def _compose_commands() -> Iterator[list[str]]:
    for path in sorted(DOCKER.glob("*compose.yaml")):
        for service in yaml.safe_load(path.read_text())["services"].values():
            if service.get("command", [""])[0] == "fedmed":
                yield service["command"]


def _shell_commands(text: str) -> Iterator[list[str]]:
    """fedmed's own commands in shell text, also behind docker and kubectl; 1 for variables."""
    joined = re.sub(r" *\\\n#? *", " ", text)
    for line in re.findall(r"\b(fedmed (?:site|coordinator|data) .*)$", joined, re.M):
        yield shlex.split(re.sub(r"\$\{?\w+\}?", "1", line), comments=True)


def _documented() -> str:
    text = (REPOSITORY / "docs" / "containers.md").read_text()
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))


def commands() -> list[list[str]]:
    found = list(_compose_commands())
    for target in ("coordinator", "site"):
        last = [x for x in image(DOCKERFILE, target, "cpu") if x.startswith("CMD ")][-1]
        found.append(json.loads(last.removeprefix("CMD ")))
    found += [c["args"] for name, _, _ in PODS for c in pod(name)["containers"]]
    for path in sorted((DOCKER / "kubernetes").glob("*-setup.yaml")):
        comments = "".join(
            line for line in path.read_text().splitlines(True) if line.startswith("#")
        )
        found += _shell_commands(comments)
    found += _shell_commands((DOCKER / "demo-setup").read_text())
    found += _shell_commands(_documented())
    unique = {tuple(c[1:]) for c in found if c[0] == "fedmed"}
    return [list(c) for c in sorted(unique)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_fedmeds_own(words):
    assert parser().parse_args(words).handler


def test_commands_were_found_and_wrong_ones_are_seen(capsys):
    found = [" ".join(c[:2]) for c in commands()]
    for expected in ("coordinator serve", "site join", "coordinator init", "site approve",
                     "site init", "coordinator enroll", "coordinator start"):  # fmt: skip
        assert expected in found
    for wrong in (["site", "joyn"], ["coordinator", "serve", "--folder", "x"]):
        with pytest.raises(SystemExit):
            parser().parse_args(wrong)
    capsys.readouterr()


@pytest.mark.parametrize("role", ["coordinator", "site"])
def test_probes_ask_the_images_own_health_check(role):
    last = [x for x in image(DOCKERFILE, role, "cpu") if x.startswith("HEALTHCHECK ")][-1]
    command = json.loads(last[last.index("CMD ") + 4 :])
    container = pod(f"{role}.yaml")["containers"][0]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == command


def test_durations_are_read():
    assert [seconds(t) for t in ("90s", "11m", "1h30m")] == [90, 660, 5400]


def test_a_site_is_well_while_its_client_holds_the_log(tmp_path):
    fault = HEALTH["fault"]
    assert "No such file" in fault("site", tmp_path)
    (tmp_path / "state").mkdir()
    log = tmp_path / "state" / "audit.jsonl"
    with AuditLog(log):
        assert fault("site", tmp_path) is None
    assert fault("site", tmp_path) == f"no service holds {log}"


def _tls(folder: Path) -> ssl.SSLContext:
    """As the coordinator's: it admits nobody without a certificate that it knows."""
    authority_key, key = SigningKey.generate(), SigningKey.generate()
    authority = certificates.authority("study", authority_key)
    issued = certificates.server_certificate(["localhost"], key.public(), authority, authority_key)
    chain = folder / "server.pem"
    chain.write_bytes(key.pem() + certificates.pem(issued))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    context.load_verify_locations(cadata=certificates.pem(authority).decode())
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextmanager
def _server(answer: Callable[[socket.socket], object]) -> Iterator[int]:
    """One caller's server on a free port."""
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller, suppress(OSError):
                answer(caller)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_a_coordinator_must_answer_on_its_port_too(tmp_path):
    fault, context = HEALTH["fault"], _tls(tmp_path)
    with AuditLog(tmp_path / "audit.jsonl"):
        with _server(lambda caller: context.wrap_socket(caller, server_side=True)) as port:
            (tmp_path / "study.toml").write_text(f"port = {port}\n")
            assert fault("coordinator", tmp_path) is None
        assert fault("coordinator", tmp_path) == f"nothing answers on port {port}"
    assert "no service holds" in fault("coordinator", tmp_path)


@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_that_speaks_no_tls_is_no_coordinator(words):
    with _server(lambda caller: caller.sendall(words)) as port:
        assert HEALTH["answers"](port) is False
