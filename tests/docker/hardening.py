"""What a container of fedmed must be held to, as functions that name each breach."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

UID = 10001
_SECRET = re.compile(r"password|secret|token|passphrase|BEGIN [A-Z ]*PRIVATE|_KEY\b|api.?key", re.I)
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> int:
    """Compose's durations: ``1h30m``, ``11m``, ``90s``."""
    return sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([smh])", text))


def secrets_in(words: object) -> set[str]:
    return {"secret"} if _SECRET.search(str(words or "")) else set()


def compose_service_faults(service: Mapping[str, Any], *, ports: int, drain: float) -> set[str]:
    """Breaches of one service of a compose file."""
    mounts = [m if isinstance(m, str) else m.get("source", "") for m in service.get("volumes", ())]
    tmpfs = " ".join(service.get("tmpfs", ()))
    checks = {
        "root": str(service.get("user", "")).split(":")[0] != str(UID),
        "writable root": service.get("read_only") is not True,
        "capabilities": service.get("cap_drop") != ["ALL"] or bool(service.get("cap_add")),
        "privileges": "no-new-privileges:true" not in service.get("security_opt", ())
        or any("unconfined" in o for o in service.get("security_opt", ())),
        "privileged": bool(service.get("privileged")),
        "host namespace": any(
            "host" in str(service.get(k, ""))
            for k in ("network_mode", "pid", "ipc", "uts", "userns_mode")
        ),
        "devices": bool(service.get("devices")),
        "socket": any("docker.sock" in m or m in ("/", "/proc", "/sys") for m in mounts),
        "tmp": not all(w in tmpfs for w in ("/tmp:", "noexec", "nosuid", "nodev", "size=")),
        "memory": not service.get("mem_limit"),
        "pids": not service.get("pids_limit"),
        "ports": len(service.get("ports", ())) != ports or bool(service.get("expose")),
        "restart": service.get("restart") != "unless-stopped",
        "grace": seconds(str(service.get("stop_grace_period", "10s"))) <= drain,
        "no command": not service.get("command"),
    }
    return {name for name, breach in checks.items() if breach} | (
        secrets_in(service.get("environment")) | secrets_in(service.get("command"))
    )


def pod_faults(pod: Mapping[str, Any], *, ports: int, drain: float) -> set[str]:
    """Breaches of the "restricted" pod security standard, and of what fedmed adds to it."""
    security = pod.get("securityContext", {})
    checks = {
        "root": security.get("runAsNonRoot") is not True or security.get("runAsUser") != UID,
        "seccomp": security.get("seccompProfile") != {"type": "RuntimeDefault"},
        "key files": security.get("fsGroupChangePolicy") != "OnRootMismatch",
        "service account": pod.get("automountServiceAccountToken") is not False,
        "host namespace": any(pod.get(k) for k in ("hostNetwork", "hostPID", "hostIPC")),
        "host path": any("hostPath" in v for v in pod.get("volumes", ())),
        "grace": pod.get("terminationGracePeriodSeconds", 30) <= drain,
        "init containers": bool(pod.get("initContainers")),
    }
    found = {name for name, breach in checks.items() if breach}
    for container in pod["containers"]:
        found |= _container_faults(container, ports)
    return found


def _container_faults(container: Mapping[str, Any], ports: int) -> set[str]:
    security = container.get("securityContext", {})
    limits = container.get("resources", {}).get("limits", {})
    declared = container.get("ports", ())
    checks = {
        "privileges": security.get("allowPrivilegeEscalation") is not False,
        "privileged": bool(security.get("privileged")),
        "writable root": security.get("readOnlyRootFilesystem") is not True,
        "capabilities": security.get("capabilities") != {"drop": ["ALL"]},
        "container overrides": bool(
            {"runAsUser", "runAsNonRoot", "seccompProfile"} & set(security)
        ),
        "limits": not {"cpu", "memory", "ephemeral-storage"} <= set(limits),
        "ports": len(declared) != ports or any("hostPort" in p for p in declared),
    }
    return {name for name, breach in checks.items() if breach} | (
        secrets_in(container.get("env")) | secrets_in(container.get("args"))
    )


def egress_faults(policy: Mapping[str, Any]) -> set[str]:
    """Breaches of a site's network policy: DNS and one address go out, nothing comes in."""
    spec = policy["spec"]
    open_to = [tuple(sorted(p["port"] for p in r.get("ports", ()))) for r in spec.get("egress", ())]
    addresses = [
        to.get("ipBlock", {}).get("cidr", "/32" if "podSelector" in to else "")
        for rule in spec.get("egress", ())
        for to in rule.get("to", ({},))
    ]
    checks = {
        "types": set(spec.get("policyTypes", ())) != {"Ingress", "Egress"},
        "ingress": spec.get("ingress", []) != [],
        "egress ports": sorted(open_to) != [(53, 53), (8443,)],
        "egress addresses": not all(a.endswith(("/32", "/128")) for a in addresses),
    }
    return {name for name, breach in checks.items() if breach}


def stages(dockerfile: str) -> Iterator[tuple[str, str, list[str]]]:
    """(name, parent, instructions) of each stage; comments and continuations are resolved."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    current: tuple[str, str, list[str]] | None = None
    for line in filter(None, map(str.strip, lines)):
        if found := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            if current is not None:
                yield current
            current = (found[2], found[1], [])
        elif current is not None:
            current[2].append(line)
    if current is not None:
        yield current


def image(dockerfile: str, target: str, variant: str) -> list[str]:
    """All instructions that make one target, first to last."""
    known = {name: (parent, lines) for name, parent, lines in stages(dockerfile)}
    chain: list[str] = []
    name = target
    while name in known:
        parent, lines = known[name]
        chain = [*lines, *chain]
        name = parent.replace("${VARIANT}", variant)
    return chain


def dockerfile_faults(dockerfile: str, target: str, variant: str) -> set[str]:
    """Breaches of one target of the Dockerfile."""
    lines = image(dockerfile, target, variant)
    pip = [line for line in lines_of_all(dockerfile) if "pip " in line and " install" in line]
    environment = " ".join(line for line in lines if line.startswith("ENV "))
    exec_form = [line for line in lines if line.startswith(("CMD ", "ENTRYPOINT "))]
    exposed = [line for line in lines if line.startswith("EXPOSE ")]
    checks = {
        "base": not re.search(r"^ARG BASE$", dockerfile, re.M),
        "unknown base": "FROM ${BASE} AS base" not in dockerfile
        or len(re.findall(r"^FROM [^$b]\S*[:/]", dockerfile, re.M)) > 0,
        "root": [line for line in lines if line.startswith("USER ")][-1:] != [f"USER {UID}:{UID}"],
        "shell form": not all("[" in line for line in exec_form) or len(exec_form) != 2,
        "init": 'ENTRYPOINT ["tini", "--"]' not in lines,
        "health": sum(line.startswith("HEALTHCHECK ") for line in lines) != 1
        or any(line == "HEALTHCHECK NONE" for line in lines),
        "hashes": not pip
        or not all("--require-hashes" in line and "--no-index" in line for line in pip),
        "ports": exposed != (["EXPOSE 8443"] if target == "coordinator" else []),
        "home": not all(
            f"{name}=/tmp" in environment for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")
        ),
        "volume": any(line.startswith(("VOLUME ", "ADD ")) for line in lines),
    }
    return {name for name, breach in checks.items() if breach} | secrets_in(environment)


def lines_of_all(dockerfile: str) -> list[str]:
    return [line for _, _, lines in stages(dockerfile) for line in lines]
