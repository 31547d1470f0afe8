"""Containers and Kubernetes: what is written there exists, and is what the schemas want."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from facelane_bridge import config as bridge_config
from facelane_server import config
from facelane_server.capacity import Load
from facelane_server.domain import Stage
from facelane_server.edge import health
from facelane_server.observability.metrics import Metrics, Sources

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CONTAINERFILE = (DEPLOY / "container/Containerfile").read_text()
COMPOSE = sorted((DEPLOY / "compose").glob("compose*.yaml"))
RESOURCES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
VERSIONS = ("1.29", "1.33", "1.37")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomization(folder: str) -> Any:
    (found,) = documents(KUBERNETES / folder / "kustomization.yaml")
    return found


def pods() -> Iterator[tuple[str, Any]]:
    for path in RESOURCES:
        for document in documents(path):
            if document["kind"] in ("StatefulSet", "Deployment"):
                yield path.parent.name, document["spec"]["template"]["spec"]


def server_config(path: Path) -> config.Config:
    return config.parse(path.read_text())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", RESOURCES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_resource_is_what_kubernetes_takes(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_resource_with_a_mistake_is_found() -> None:
    (wrong,) = documents(KUBERNETES / "base/statefulset.yaml")
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", ["base", "gpu", "bridge"])
def test_a_kustomization_names_what_is_there(folder: str) -> None:
    found = kustomization(folder)
    home = KUBERNETES / folder
    for name in found["resources"]:
        assert (home / name).exists(), name
    here = {path.name for path in home.glob("*.yaml")} - {"kustomization.yaml"}
    assert here == {name for name in found["resources"] if name.endswith(".yaml")}
    for made in found.get("configMapGenerator", []):
        assert all((home / name).is_file() for name in made["files"])
    for patch in found.get("patches", []):
        target = patch["target"]
        resources = [d for path in RESOURCES for d in documents(path)]
        assert any(
            (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])
            for d in resources
        )
        for step in yaml.safe_load(patch["patch"]):
            (server,) = (d for d in resources if d["kind"] == target["kind"])
            at: Any = server
            for part in step["path"].split("/")[1:-1]:
                at = at[int(part)] if isinstance(at, list) else at[part]


def test_pods_run_without_rights_and_mount_what_they_have() -> None:
    seen = 0
    for folder, pod in pods():
        seen += 1
        made = {c["name"] for c in kustomization(folder)["configMapGenerator"]}
        images = {image["name"] for image in kustomization(folder)["images"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            assert "memory" in container["resources"]["limits"]
            assert container["image"] in images
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            uid = pod["securityContext"]["runAsUser"]
            assert f"USER {uid}:{uid}" in CONTAINERFILE
        config_maps = {
            volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume
        }
        # The authority's certificate is brought by whoever deploys, as the file's head says.
        assert config_maps <= made | {"facelane-ca"}
    assert seen == 2


def test_probes_ask_for_what_health_knows_where_it_is_told() -> None:
    settings = server_config(KUBERNETES / "base/server.toml")
    names = health.derive(dict.fromkeys(Stage, True), draining=False)
    (pod,) = (pod for folder, pod in pods() if folder == "base")
    (server,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert settings.server.listen == f"0.0.0.0:{ports['grpc']}"
    assert settings.metrics.listen == f"0.0.0.0:{ports['metrics']}"
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = server[kind]["httpGet"]
        assert ports[asked["port"]] == ports["metrics"]
        assert asked["path"].removeprefix("/health/") in names
    # A liveness probe that asked for more would kill a server whose pools mend themselves.
    assert server["livenessProbe"]["httpGet"]["path"] == "/health/facelane.process"
    assert pod["terminationGracePeriodSeconds"] > settings.server.drain_grace_s


def test_it_scales_by_a_metric_that_there_is() -> None:
    (scaler,) = documents(KUBERNETES / "base/horizontalpodautoscaler.yaml")
    exposed = Metrics(Sources(load=lambda: Load(1.0, 2.0, 1, 0))).exposition().decode()
    for metric in scaler["spec"]["metrics"]:
        assert f"# TYPE {metric['pods']['metric']['name']} gauge" in exposed
    target = scaler["spec"]["scaleTargetRef"]
    (workload,) = documents(KUBERNETES / "base/statefulset.yaml")
    assert (target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"])


@pytest.mark.parametrize(
    "path",
    [
        KUBERNETES / "base/server.toml",
        DEPLOY / "compose/server.toml",
        DEPLOY / "compose/server.isolated.toml",
    ],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_the_server_takes_its_configuration(path: Path) -> None:
    server_config(path)


@pytest.mark.parametrize("path", [KUBERNETES / "base/server.toml", DEPLOY / "compose/server.toml"])
def test_what_is_kept_of_people_lies_encrypted(path: Path) -> None:
    """In PostgreSQL nothing is without a master key, and servers that made one each could not
    share a store."""
    store = server_config(path).store
    assert store.url.startswith("postgresql://")
    kind, _, name = store.master_key.partition(":")
    assert kind == "env"
    (pod,) = (pod for folder, pod in pods() if folder == "base")
    given = {variable["name"] for variable in pod["containers"][0]["env"]}
    compose = (DEPLOY / "compose/compose.yaml").read_text()
    assert name in given
    assert f"{name}=$$(cat /run/secrets/master-key)" in compose


@pytest.mark.parametrize(
    "path", [KUBERNETES / "bridge/bridge.toml", DEPLOY / "compose/bridge.toml"]
)
def test_the_bridge_takes_its_configuration(path: Path) -> None:
    assert bridge_config.parse(path.read_text()).cameras


@pytest.mark.parametrize("path", COMPOSE, ids=lambda p: p.stem)
def test_compose_names_what_is_there(path: Path) -> None:
    (found,) = documents(path)
    # What its head tells to make.
    made = set(re.findall(r"deploy/compose/([\w.-]+)", path.read_text()))
    targets = set(re.findall(r"^FROM .* AS (\w+)$", CONTAINERFILE, re.MULTILINE))
    for service in found["services"].values():
        if "build" in service:
            context = path.parent / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in targets
        if service.get("image", "").startswith("facelane"):
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (path.parent / source).is_file(), source
            else:
                assert source in found["volumes"]
        assert set(service.get("secrets", [])) <= set(found["secrets"])
        assert set(service.get("depends_on", [])) <= set(found["services"])
    for secret in found["secrets"].values():
        assert Path(secret["file"]).name in made


def test_images_install_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = re.findall(r'"\.\[([\w,]+)\]"', CONTAINERFILE)
    assert len(wanted) == 3
    for extra in itertools.chain.from_iterable(words.split(",") for words in wanted):
        assert extra in project["optional-dependencies"]
    for command in re.findall(r'CMD \["([\w-]+)"', CONTAINERFILE):
        assert command in project["scripts"]


def test_isolated_models_share_a_folder_and_nothing_else() -> None:
    home = DEPLOY / "compose"
    (found,) = documents(home / "compose.isolated.yaml")
    settings = server_config(home / "server.isolated.toml")
    assert settings.pools.recognizer is not None
    assert settings.pools.recognizer.isolation == "external"
    assert settings.runtime_dir == "/run/facelane"
    services = found["services"]
    assert set(services) == {"server", *(stage.value for stage in Stage)}
    for name, service in services.items():
        assert "sockets:/run/facelane" in service["volumes"]
        assert service["user"] == "10001:10001"
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "mem_limit" in service
        if name != "server":
            assert service["network_mode"] == "none"
            assert f"/run/facelane/{name}.sock" in service["command"]


def test_the_containerfile_is_one() -> None:
    lines = re.sub(r"\\\n", "", CONTAINERFILE).splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    known = {"ARG", "FROM", "COPY", "RUN", "USER", "ENV", "CMD", "EXPOSE", "WORKDIR", "STOPSIGNAL"}
    assert set(words) <= known
    assert words[:2] == ["ARG", "FROM"]
    for copied in re.findall(r"^COPY ([\w. ]+) [\w./]+$", CONTAINERFILE, re.MULTILINE):
        allowed = (ROOT / ".dockerignore").read_text().splitlines()
        for name in copied.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in allowed
