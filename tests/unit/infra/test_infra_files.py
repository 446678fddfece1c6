"""The files for containers, as far as they can be checked without an engine: against their schemas and each other."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

pytestmark = pytest.mark.process

INFRA = Path(__file__).parents[3] / "infra"


def tool(name: str, *arguments: str) -> None:
    finished = subprocess.run(
        [str(Path(sys.executable).parent / name), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_image_is_built_as_the_linter_wants_it() -> None:
    tool("hadolint", str(INFRA / "Dockerfile"))


def test_the_compose_file_keeps_its_schema_and_names_no_password() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml"))
    text = (INFRA / "compose.yaml").read_text()
    content = yaml.safe_load(text)
    for service in content["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|KEY", name):
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?[^}]+\}", value), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", text))
    assert used == {
        "NIGHTLY_IMAGE", "NIGHTLY_JOBS_FOLDER", "NIGHTLY_WORK_POOL", "POSTGRES_PASSWORD", "PREFECT_AUTH",
        "S3_ACCESS_KEY", "S3_SECRET_KEY",
    }  # fmt: skip


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_manifests_are_kubernetes_objects(version: str) -> None:
    for manifest in yaml.safe_load_all((INFRA / "kubernetes/worker.yaml").read_text()):
        kubernetes_validate.validate(manifest, version, strict=True)
    kubernetes_validate.validate(job_manifest(), version, strict=True)


def test_each_run_holds_one_gpu_and_reads_its_settings_from_a_secret() -> None:
    (container,) = job_manifest()["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["envFrom"] == [{"secretRef": {"name": "nightly"}}]


def job_manifest() -> Any:
    """The Job that Prefect makes of the work pool's template by its defaults."""
    template = json.loads((INFRA / "kubernetes/work-pool.json").read_text())
    given = {name: variable.get("default") for name, variable in template["variables"]["properties"].items()}
    given |= {
        "name": "night",
        "command": ["prefect", "flow-run", "execute"],
        "env": [],
        "labels": {},
        "annotations": {},
    }

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: filled(one) for key, one in value.items()}
            return {key: one for key, one in found.items() if one is not None}
        if isinstance(value, list):
            return [filled(one) for one in value]
        if isinstance(value, str) and (whole := re.fullmatch(r"\{\{ (\w+) \}\}", value)):
            return given[whole[1]]
        return (
            re.sub(r"\{\{ (\w+) \}\}", lambda match: str(given[match[1]]), value) if isinstance(value, str) else value
        )

    return filled(template["job_configuration"]["job_manifest"])
