"""The package as a whole: which part imports which, what a wheel holds, and pages that say what is."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import REPOSITORY

PACKAGES = ("edge_runtime", "scheduler", "predictors")
# What several of the large parts stand on.
SHARED = (
    "edge_runtime.addresses",
    "edge_runtime.private_files",
    "edge_runtime.array_file",
    "edge_runtime.database",
    "edge_runtime.private_authority",
    "edge_runtime.error_catalog",
    "edge_runtime.grpc_guard",
)
# part -> parts of this project that it may import, beside itself
MAY_IMPORT = {
    "edge_runtime": set(),
    "edge_runtime.errors": set(),
    "edge_runtime.addresses": set(),
    "edge_runtime.private_files": {"edge_runtime.errors", "edge_runtime.model_store"},
    "edge_runtime.array_file": {"edge_runtime.errors", "edge_runtime.private_files"},
    "edge_runtime.database": {
        "edge_runtime.errors",
        "edge_runtime.model_store",
        "edge_runtime.private_files",
    },
    "edge_runtime.private_authority": {"edge_runtime.errors"},
    "edge_runtime.error_catalog": {"edge_runtime", "edge_runtime.errors"},
    "edge_runtime.grpc_guard": {"edge_runtime", "edge_runtime.errors", "edge_runtime.error_catalog"},
    "edge_runtime.engine": {"edge_runtime.errors"},
    "edge_runtime.model_store": {"edge_runtime", "edge_runtime.errors", "edge_runtime.engine"},
    "edge_runtime.cluster": {
        "edge_runtime",
        "edge_runtime.errors",
        "edge_runtime.engine",
        "edge_runtime.model_store",
        *SHARED,
        "edge_runtime.v1",
        "scheduler",
        "predictors",
    },
    "edge_runtime.personalize": {
        "edge_runtime",
        "edge_runtime.errors",
        "edge_runtime.engine",
        "edge_runtime.model_store",
        "edge_runtime.private_files",
        "edge_runtime.array_file",
        "edge_runtime.database",
    },
    "edge_runtime.federation": {"edge_runtime", "edge_runtime.errors", "edge_runtime.engine"},
    "edge_runtime.daemon": {
        "edge_runtime",
        "edge_runtime.errors",
        "edge_runtime.engine",
        "edge_runtime.model_store",
        *SHARED,
        "edge_runtime.cluster",
        "edge_runtime.personalize",
        "edge_runtime.federation",
        "edge_runtime.v1",
    },
    "edge_runtime.cli": {
        "edge_runtime",
        "edge_runtime.errors",
        "edge_runtime.engine",
        "edge_runtime.model_store",
        *SHARED,
        "edge_runtime.cluster",
        "edge_runtime.daemon",
        "edge_runtime.client",
        "edge_runtime.personalize",
    },
    "edge_runtime.client": {
        "edge_runtime",
        "edge_runtime.errors",
        *SHARED,
        "edge_runtime.daemon",
        "edge_runtime.cluster",
        "edge_runtime.model_store",
        "edge_runtime.personalize",
        "edge_runtime.v1",
    },
    "edge_runtime.v1": set(),
    "scheduler": set(),
    "predictors": set(),
}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((REPOSITORY / package).rglob("*.py"))


def part_of(module: str) -> str:
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "edge_runtime" else names[0]


def module_of(path: Path) -> str:
    names = list(path.relative_to(REPOSITORY).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Modules that a file imports; with ``top_level`` only those that its own import needs."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} has a relative import"
                # `from edge_runtime import x` may mean the subpackage x.
                modules = {f"{child.module}.{alias.name}" for alias in child.names}
                known = {name for name in modules if is_module(name)}
                found.update(known or {child.module or ""})
            elif top_level and is_deferred(child):
                continue
            else:
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def is_deferred(node: ast.AST) -> bool:
    """Whether what a node holds does not run when its file is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def is_module(name: str) -> bool:
    path = REPOSITORY / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_parts_import_only_what_lies_below_them() -> None:
    for path in sources():
        part = part_of(module_of(path))
        own = {name for name in imports(path, top_level=False) if name.split(".")[0] in PACKAGES}
        forbidden = {part_of(name) for name in own} - MAY_IMPORT[part] - {part}
        assert not forbidden, f"{path} imports {forbidden}"


def test_base_install_needs_only_what_it_declares() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    modules = {
        "llama_cpp_python": "llama_cpp",
        "grpcio": "grpc",
        "protobuf": "google",
        "grpcio_health_checking": "grpc_health",
        "grpcio_reflection": "grpc_reflection",
    }
    declared = {modules.get(name, name) for name in declared}
    for path in sources():
        roots = {name.split(".")[0] for name in imports(path, top_level=True)}
        foreign = roots - set(sys.stdlib_module_names) - set(PACKAGES)
        assert foreign <= declared, f"{path} imports {foreign - declared}"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    page = (REPOSITORY / "docs" / "dependencies.md").read_text()
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for line in lines:
        name = re.split(r"[^\w-]", line)[0]
        assert f"| {name} |" in page, f"docs/dependencies.md says nothing of {name}"


def test_reference_is_what_the_commands_say() -> None:
    path = REPOSITORY / "docs" / "write_reference.py"
    spec = importlib.util.spec_from_file_location("write_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.reference(), "run `make reference`"


def pages() -> list[Path]:
    roots = [REPOSITORY, *(REPOSITORY / name for name in ("docs", "proto", "deploy", "benchmarks"))]
    return [page for root in roots for page in sorted(root.glob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page} links to {target}"


def build(kind: str, source: Path, target: Path) -> Path:
    pytest.importorskip("hatchling", reason="hatchling comes with the dev extra")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (found,) = target.iterdir()
    return found


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_program_and_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    names = contents(build("wheel", REPOSITORY, tmp_path))
    assert "edge_runtime/demo_model/edge-demo-q8_0.gguf" in names
    assert "edge_runtime/demo_model/edge-demo-q8_0.calibration.npz" in names
    assert "edge_runtime/demo_model/facts.json" in names
    modules = {str(path.relative_to(REPOSITORY)) for path in sources()}
    assert modules <= names
    roots = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert roots == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_source_distribution_builds_the_same_wheel(demo_model: Path, tmp_path: Path) -> None:
    archive = build("sdist", REPOSITORY, tmp_path / "sdist")
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("edge_runtime-*")
    again = contents(build("wheel", source, tmp_path / "again"))
    assert again == contents(build("wheel", REPOSITORY, tmp_path / "wheel"))


def test_set_up_names_everything_that_is_missing_at_once(tmp_path: Path) -> None:
    """A machine with a shell, Python and make, but no compilers."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "make"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tools / "python3").symlink_to(sys.executable)
    done = subprocess.run(
        [REPOSITORY / "deploy" / "prepare.sh", tmp_path / "venv"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[:3] == ["missing: gcc", "missing: g++", "missing: cmake"]
    assert "sudo apt-get install -y python3 python3-venv python3-dev gcc g++ cmake make" in done.stderr
    assert not (tmp_path / "venv").exists()
