"""The restricted Pod Security Standard, as far as a pod's fields tell: what of a template violates it.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.manifests.rendering import Object

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
SELINUX = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
SECCOMP = ("RuntimeDefault", "Localhost")


def violations(template: Object) -> list[str]:
    pod = template["spec"]
    return [*_of_pod(pod), *(f"{c['name']}: {text}" for c in containers(pod) for text in _of_container(c, pod))]


def containers(pod: Object) -> list[Object]:
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [container for kind in kinds for container in pod.get(kind, [])]


def _of_pod(pod: Object) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", []):
        if other := set(volume) - VOLUMES - {"name"}:
            yield f"volume {volume['name']} is a {other.pop()}"
    for sysctl in pod.get("securityContext", {}).get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"


def _of_container(container: Object, pod: Object) -> Iterator[str]:
    own, shared = container.get("securityContext", {}), pod.get("securityContext", {})
    both = shared | own  # a container's word counts before its pod's
    capabilities = own.get("capabilities", {})
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities are not dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"capabilities {capabilities['add']}"
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if both.get("runAsUser") == 0:
        yield "runAsUser 0"
    if both.get("seccompProfile", {}).get("type") not in SECCOMP:
        yield "seccompProfile is not RuntimeDefault or Localhost"
    if both.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield "appArmorProfile Unconfined"
    selinux = both.get("seLinuxOptions", {})
    if selinux.get("type") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if both.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    for handler in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(handler, {}).get("httpGet", {}).get("host"):
            yield f"{handler} of another host"
