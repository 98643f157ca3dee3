"""What the rooms may know of each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICE = sorted((ROOT / "service").glob("*.py"))
TRAINING = sorted((ROOT / "training").glob("*.py"))

# DESIGN: training may use what is pure; the HTTP edge and the state are none of its business.
OPEN_TO_TRAINING = {
    "image",
    "bundle",
    "detector",
    "devices",
    "calibration",
    "heatmap",
    "regions",
    "errors",
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SERVICE, ids=lambda path: path.name)
def test_the_service_never_imports_training_torch_or_onnx(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}

    assert not roots & {"training", "torch", "timm", "onnx", "scipy", "sklearn"}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_training_uses_only_the_pure_part_of_the_service(path: Path) -> None:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("service.")}

    assert used <= OPEN_TO_TRAINING


def test_importing_the_service_loads_no_training_package() -> None:
    code = (
        "import sys, service.app, service.__main__; "
        "print(sorted({'torch', 'onnx', 'timm', 'training', 'scipy'} & set(sys.modules)))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["service", "training"])
def test_modules_of_a_package_do_not_import_each_other_in_circles(package: str) -> None:
    graph = {
        path.stem: {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}
        for path in sorted((ROOT / package).glob("*.py"))
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in sorted(graph[module] & set(graph)):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "path", SERVICE + TRAINING, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SERVICE + TRAINING, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_room_is_in_the_architecture_page(path: Path) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()

    assert path.stem.startswith("__") or f"`{path.parent.name}/{path.stem}`" in page


def test_the_architecture_page_names_no_room_that_is_not_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()

    for room in re.findall(r"`((?:service|training)/\w+)`", page):
        assert (ROOT / f"{room}.py").is_file(), room
