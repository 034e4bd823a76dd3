"""The law of the house: a room imports only rooms before it; files stay short; names say what is inside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# finetune stands before rank: ranking without a model trains the embedded one.
ROOMS = ("data", "capture", "statistics", "masks", "figures", "finetune", "rank", "unlearn", "evaluate", "report")
FOR_ALL = ("models", "runs", "config", "documents", "errors", "hub", "lazy", "paths", "signals")
FORBIDDEN_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc"}
SOURCES = ("fillm", "kernels", "csrc", "tests", "benchmarks")
LONGEST = 400  # lines


def violations(root: Path) -> list[str]:
    """Every breach in a checkout, as `path:line: what`."""
    return [*_imports(root), *_kernel_imports(root), *_names(root), *_lengths(root), *_packaging(root)]


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.is_dir() else []


def imported_modules(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, functions and type-checking blocks included.

    `from fillm import data` counts as `fillm.data`; a string handed to `import_module` or `__import__` counts too.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def _imports(root: Path) -> Iterator[str]:
    house = root / "fillm"
    known = {*ROOMS, *FOR_ALL}
    for path in _python_files(house):
        inside = path.relative_to(house).parts
        room = inside[0].removesuffix(".py")
        if len(inside) == 1 and room in ("__init__", "__main__"):
            continue  # the doors: they name rooms, and open them when somebody knocks
        where = f"{path.relative_to(root)}"
        if room not in known:
            yield f"{where}:1: {room} is no room of the layout"
            continue
        package = ".".join(["fillm", *inside[:-1]])
        for line, module in imported_modules(path, package):
            parts = module.split(".")
            if parts[0] != "fillm" or len(parts) < 2:
                continue
            other = parts[1]
            if other == room or other in FOR_ALL or other == "__version__":
                continue
            if room in FOR_ALL:
                yield f"{where}:{line}: {room} is for all rooms and imports none, but imports {module}"
            elif other not in ROOMS or ROOMS.index(other) >= ROOMS.index(room):
                yield f"{where}:{line}: {room} imports {module}, which does not come before it"


def _kernel_imports(root: Path) -> Iterator[str]:
    library = root / "kernels" / "fillm_kernels"
    for path in _python_files(library):
        package = ".".join(["fillm_kernels", *path.relative_to(library).parts[:-1]])
        for line, module in imported_modules(path, package):
            if module.split(".")[0] in ("fillm", "transformers", "datasets", "peft"):
                yield f"{path.relative_to(root)}:{line}: the kernel library imports {module}"


def _names(root: Path) -> Iterator[str]:
    for source in SOURCES:
        for path in sorted((root / source).rglob("*")):
            if path.stem.lower() in FORBIDDEN_NAMES and (path.is_dir() or path.suffix in (".py", ".cpp", ".h", ".cu")):
                yield f"{path.relative_to(root)}:1: the name says nothing of what is inside"


def _lengths(root: Path) -> Iterator[str]:
    for source in SOURCES:
        for suffix in ("py", "cpp", "h", "hpp", "cu", "cuh"):
            for path in sorted((root / source).rglob(f"*.{suffix}")):
                count = len(path.read_text(encoding="utf-8").splitlines())
                if count > LONGEST:
                    yield f"{path.relative_to(root)}:{count}: {count} lines, more than {LONGEST}"


def _packaging(root: Path) -> Iterator[str]:
    if (root / "kernels" / "__init__.py").exists():
        yield "kernels/__init__.py:1: with it, transformers takes the folder for the Hugging Face package `kernels`"


def test_this_checkout_keeps_the_law() -> None:
    assert violations(ROOT) == []


def test_every_room_and_source_is_looked_at() -> None:
    for name in ("data", "capture", "statistics", "rank", "finetune", "models", "runs"):
        assert len(_python_files(ROOT / "fillm" / name)) > 1, name
    assert len(_python_files(ROOT / "kernels" / "fillm_kernels")) > 3


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small checkout that keeps the law."""
    files = {
        "fillm/__init__.py": "from importlib import import_module\nROOM = import_module('fillm.rank')\n",
        "fillm/errors.py": "class E(Exception): ...\n",
        "fillm/data/__init__.py": "from fillm.errors import E\nfrom fillm.data.rows import Row\n",
        "fillm/data/rows.py": "from . import specs\nfrom ..errors import E\nimport torch\n",
        "fillm/data/specs.py": "import fillm.config\n",
        "fillm/capture/engine.py": "from fillm.data import Batch\nimport fillm_kernels as fk\n",
        "fillm/rank/command.py": "def run():\n    from fillm import finetune\n",
        "kernels/fillm_kernels/__init__.py": "import torch\nfrom fillm_kernels.errors import E\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_a_lawful_house_passes(house: Path) -> None:
    assert violations(house) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("fillm/data/late.py", "import fillm.rank.soir\n", "data imports fillm.rank.soir"),
        ("fillm/data/late.py", "from fillm.capture import Capture\n", "data imports fillm.capture.Capture"),
        ("fillm/data/late.py", "from fillm import capture\n", "data imports fillm.capture"),
        ("fillm/data/late.py", "from .. import rank\n", "data imports fillm.rank"),
        ("fillm/data/late.py", "from ..rank.soir import rank_soir\n", "data imports fillm.rank.soir.rank_soir"),
        ("fillm/capture/deep/er.py", "from ...rank import soir\n", "capture imports fillm.rank.soir"),
        (
            "fillm/statistics/hidden.py",
            "def f():\n    from fillm.rank import soir\n",
            "hidden.py:2: statistics imports",
        ),
        (
            "fillm/statistics/typed.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fillm.rank\n",
            "typed.py:3",
        ),
        ("fillm/statistics/named.py", "import importlib\nimportlib.import_module('fillm.rank')\n", "named.py:2"),
        ("fillm/finetune/late.py", "from fillm.rank import RankConfig\n", "finetune imports fillm.rank"),
        ("fillm/models/late.py", "from fillm.data import Row\n", "models is for all rooms and imports none"),
        ("fillm/runs/late.py", "from fillm.data import Row\n", "runs is for all rooms and imports none"),
        ("fillm/config.py", "from fillm.rank import RankConfig\n", "config is for all rooms and imports none"),
        ("fillm/attic/old.py", "", "attic is no room of the layout"),
        ("fillm/rank/utils.py", "", "utils.py:1: the name says nothing"),
        ("fillm/rank/common/x.py", "", "common:1: the name says nothing"),
        ("csrc/helpers.cpp", "", "helpers.cpp:1: the name says nothing"),
        ("tests/core/test_x.py", "", "core:1: the name says nothing"),
        ("kernels/fillm_kernels/op.py", "from fillm.errors import E\n", "the kernel library imports fillm.errors.E"),
        ("kernels/__init__.py", "", "transformers takes the folder"),
        ("tests/rank/test_long.py", "x = 1\n" * 401, "401 lines"),
        ("csrc/cpu/long.cpp", "\n" * 401, "401 lines"),
        ("benchmarks/long.py", "\n" * 500, "500 lines"),
    ],
)
def test_a_breach_is_found(house: Path, path: str, text: str, complaint: str) -> None:
    (house / path).parent.mkdir(parents=True, exist_ok=True)
    (house / path).write_text(text, encoding="utf-8")
    found = violations(house)
    assert len(found) == 1 and complaint in found[0]


def test_four_hundred_lines_are_allowed(house: Path) -> None:
    (house / "fillm" / "rank" / "long.py").write_text("x = 1\n" * LONGEST, encoding="utf-8")
    assert violations(house) == []
