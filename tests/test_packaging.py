"""The installed package is what the repository shows: same packages, same files, one name, quick to import."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

import rdm_rl

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"rdm_rl": ROOT / "rdm_rl", "rdm_rl.rewards": ROOT / "rewards", "rdm_rl.trainers": ROOT / "trainers"}
# Distributions whose import name differs from their own.
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}


def package_files() -> dict[str, Path]:
    """Every file of the package, by its path in the wheel. Links are not followed: their folders are in FOLDERS."""
    files = {}
    for package, folder in FOLDERS.items():
        for parent, subfolders, names in os.walk(folder):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            for path in (Path(parent, name) for name in names):
                if not path.is_symlink():
                    files[f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    return files


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy without the links, as on a system that has none."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    copytree(ROOT / "rdm_rl", source / "rdm_rl", ignore=ignore_patterns("__pycache__", "rewards", "trainers"))
    for name in ("rewards", "trainers"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = output.glob("*.whl")
    return path


def test_packages_list_matches_the_folders() -> None:
    found = {name.removesuffix("/__init__.py").replace("/", ".") for name in package_files() if "__init__.py" in name}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("room", ["rewards", "trainers"])
def test_rooms_are_mapped_and_linked(room: str) -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"rdm_rl.{room}"] == room
    link = ROOT / "rdm_rl" / room
    if link.is_symlink():  # a checkout without support for links has a text file here, and the mapping suffices
        assert link.readlink() == Path("..", room)
        assert link.resolve() == ROOT / room


def test_rooms_cannot_be_imported_under_their_folder_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    for room in ("rewards", "trainers"):
        with pytest.raises(ImportError, match=f"Import `rdm_rl.{room}`"):
            importlib.import_module(room)


def test_import_is_quick_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import rdm_rl, rdm_rl.rewards, rdm_rl.trainers;"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    results = [run_python(code, cwd=ROOT).stdout.split() for _ in range(3)]
    assert {loaded for _, loaded in results} == {"False"}
    assert min(float(seconds) for seconds, _ in results) < 0.3


@pytest.mark.parametrize("package", ["rdm_rl", "rdm_rl.rewards", "rdm_rl.trainers", "rdm_rl.evaluation"])
def test_public_names_resolve(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'RDMTrianer'"):
        _ = rdm_rl.RDMTrianer


def test_version_is_the_same_everywhere() -> None:
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert {PROJECT["project"]["version"], citation[1]} == {rdm_rl.__version__}


def test_torchvision_is_never_required() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torchvision" not in requirement_names(declared) | requirement_names(pinned)


def test_every_imported_distribution_is_declared() -> None:
    imported = set()
    for path in package_files().values():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(str(node.module).split(".")[0])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [name for extra, names in extras.items() if extra != "dev" for name in names]
    declared = requirement_names([*PROJECT["project"]["dependencies"], *optional])
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    assert imported - known - sys.stdlib_module_names - {"rdm_rl"} == set()


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(package_files())


def test_wheel_imports_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import rdm_rl.rewards, rdm_rl.trainers; print(rdm_rl.rewards.__file__, rdm_rl.trainers.__file__)"
    result = run_python(code, cwd=tmp_path, path=tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert all(Path(path).is_relative_to(tmp_path / "site" / "rdm_rl") for path in result.stdout.split())
