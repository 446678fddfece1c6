"""Installing: what is locked is what pip may install, and an interrupted installation is gone on with."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.install import LOCKED, forget_unfinished

ROOT = Path(__file__).parents[2]
RUN, CUDA = "requirements.lock", "infra/cuda.lock"
TEST, BENCH = "tests/requirements.lock", "tests/benchmarks/requirements.lock"


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each package of a lock with its hashes."""
    entries = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
    return [
        (Requirement(entry.split("\\")[0]), re.findall(r"--hash=sha256:([0-9a-f]{64})(?!\S)", entry))
        for entry in entries
    ]


@pytest.mark.parametrize("name", [RUN, CUDA, TEST, BENCH])
def test_each_locked_package_has_one_version_and_hashes(name: str) -> None:
    for package, hashes in locked(name):
        assert re.fullmatch(r"==[^*,]+", str(package.specifier)), package
        assert hashes, package


@pytest.mark.parametrize(("extra", "names"), [(None, [RUN]), ("test", [RUN, TEST]), ("bench", [RUN, BENCH])])
def test_the_locks_keep_the_ranges_of_the_project(extra: str | None, names: list[str]) -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    wanted += content["build-system"]["requires"]
    versions = {
        canonicalize_name(package.name): str(package.specifier).removeprefix("==")
        for name in names
        for package, _ in locked(name)
    }
    for requirement in map(Requirement, wanted):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_no_package_is_locked_twice() -> None:
    for names in ([RUN, CUDA, TEST], [RUN, CUDA, BENCH]):
        packages = [package.name for name in names for package, _ in locked(name)]
        assert len(packages) == len(set(packages))


@pytest.mark.process
@pytest.mark.parametrize(("changed", "sentence"), [(False, ""), (True, "DO NOT MATCH THE HASHES")])
def test_pip_refuses_a_file_with_another_hash(tmp_path: Path, changed: bool, sentence: str) -> None:
    wheel = tmp_path / "tiny_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        description = "tiny_package-1.0.dist-info"
        archive.writestr(f"{description}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
        archive.writestr(f"{description}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{description}/RECORD", "")
    digest = hashlib.sha256(b"other" if changed else wheel.read_bytes()).hexdigest()
    (tmp_path / "lock").write_text(f"tiny-package==1.0 --hash=sha256:{digest}\n")
    source = ["--dry-run", "--no-index", "--find-links", str(tmp_path), "--requirement", str(tmp_path / "lock")]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", *LOCKED, *source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode != 0) == changed, finished.stderr
    assert sentence in finished.stderr


def test_a_package_without_its_record_is_installed_again(tmp_path: Path) -> None:
    for name in ("whole-1.0.dist-info", "interrupted-1.0.dist-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").touch()
    (tmp_path / "whole-1.0.dist-info" / "RECORD").touch()
    forget_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]
