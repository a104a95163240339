"""The order of imports, the weight of `import rcnn_svm`, and what may load what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rcnn_svm

PACKAGE = Path(rcnn_svm.__file__).parent

# A module imports only from layers above its own, and from within its own package.
LAYERS = [
    {"errors"},
    {"cache", "compiled", "config", "engine", "files", "memory", "opencv", "progress", "threads"},
    {"boxes"},
    {"structures"},
    {"datasets", "proposals", "networks", "heads", "evaluation", "postprocess"},
    {"features", "formats"},
    {"training"},
    {"contracts", "detector"},
    {"evidence", "experiment", "label_studio", "runtime"},
    {"report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LEVEL_WITHIN = {"cache", "compiled", "config", "engine", "files", "memory", "opencv", "progress", "threads"}


def part(module: str) -> str:
    """Name the part of the package that a dotted module belongs to."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rcnn_svm."):
            found.add(part(node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.module == "rcnn_svm":
            found |= {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.Import):
            found |= {part(a.name) for a in node.names if a.name.startswith("rcnn_svm.")}
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    assert own in RANK, f"{relative} belongs to no layer: name it in LAYERS"
    for other in imports_of(path) - {own}:
        below = RANK[other] < RANK[own]
        base_sibling = own in LEVEL_WITHIN and other in LEVEL_WITHIN
        assert below or base_sibling, f"{relative} must not import rcnn_svm.{other}"


def test_importing_the_package_loads_neither_torch_nor_sklearn() -> None:
    code = (
        "import sys, rcnn_svm; "
        "heavy = ('torch', 'sklearn', 'numba', 'cv2', 'matplotlib', 'distributed'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_pinned_and_exist() -> None:
    for name in rcnn_svm.__all__:
        assert getattr(rcnn_svm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rcnn_svm.nonsense
