"""What a wheel and an sdist of this checkout hold, built offline with the tools of this environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import ninja
import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fillm", "kernels", "csrc")
SOURCES = {
    "csrc/bindings.cpp",
    "csrc/cpu/ghost_norm.cpp",
    "csrc/cpu/ghost_norm.h",
    "csrc/cuda/sketch.cu",
    "csrc/cuda/host/fibers.h",
    "CMakeLists.txt",
    "setup.py",
    "LICENSE",
}


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without anything built in place, as a fresh clone would be."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, copy)
    return copy


@pytest.fixture(scope="module")
def archives(checkout: Path) -> Path:
    """The wheel, built from the sdist, and the sdist, in one folder."""
    folder = checkout.parent / f"{checkout.name}-dist"
    run("-m", "build", "--no-isolation", "--outdir", str(folder), cwd=checkout, FILLM_REQUIRE_NATIVE="1")
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    [path] = archives.glob("*.whl")
    return path


def modules(folder: Path) -> set[str]:
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


@pytest.mark.slow
def test_sdist_holds_both_packages_and_what_the_extension_is_built_from(archives: Path) -> None:
    [path] = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    want = modules(ROOT / "fillm") | {f"kernels/{name}" for name in modules(ROOT / "kernels" / "fillm_kernels")}
    want |= SOURCES | {f"csrc/{path.relative_to(ROOT / 'csrc')}" for path in (ROOT / "csrc").rglob("*.[ch]*")}
    assert want <= names
    assert "kernels/__init__.py" not in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_extension_and_no_folder_called_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fillm", "fillm_kernels"}
    assert modules(ROOT / "fillm") | modules(ROOT / "kernels" / "fillm_kernels") <= set(names)
    assert "fillm_kernels/py.typed" in names
    assert {f"fillm/report/page/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert [name for name in names if name.startswith("fillm_kernels/_C.") and name.endswith(".so")]
    if shutil.which("nvcc"):
        assert [name for name in names if name.startswith("fillm_kernels/_CUDA.") and name.endswith(".so")]


@pytest.mark.slow
def test_wheel_carries_version_licence_and_command(wheel: Path) -> None:
    source = (ROOT / "fillm" / "__init__.py").read_text(encoding="utf-8")
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    version = metadata.partition("\nVersion: ")[2].partition("\n")[0]
    assert f'__version__ = "{version}"' in source
    assert "License-Expression: Apache-2.0" in metadata
    assert "fillm = fillm.__main__:main" in commands


@pytest.mark.slow
def test_installed_wheel_runs_its_extension_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=elsewhere)
    code = (
        "import torch, fillm, fillm_kernels as fk; x = torch.ones(2, 3); "
        "print(fk.__file__, fillm.__version__, fk.backends()['ghost_norm']['used']['cpu'], "
        "fk.ghost_norm(x, x, torch.tensor([0, 2])).item())"
    )
    if shutil.which("nvcc"):
        code += "; import fillm_kernels._CUDA"  # without a driver, and without a library of CUDA
    printed = run("-c", code, cwd=elsewhere, PYTHONPATH=str(target)).split()
    assert Path(printed[0]).is_relative_to(target)
    assert printed[2:] == ["cpu", "36.0"]


def test_without_a_compiler_the_install_goes_on_and_says_so(checkout: Path, tmp_path: Path) -> None:
    dead = str(tmp_path / "no-such-compiler")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    environment = {**os.environ, "CXX": dead, "CC": dead}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fillm_kernels._C was NOT built" in done.stdout + done.stderr
    assert "fillm_kernels._CUDA was NOT built" in done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fillm_kernels/ghost_norm.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_an_option_that_does_not_exist_ends_the_build(checkout: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**os.environ, "FILLM_CUDA": "maybe"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "FILLM_CUDA must be AUTO, ON or OFF; got 'maybe'\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_what_an_earlier_build_left_is_not_shipped(kind: str, checkout: Path, tmp_path: Path) -> None:
    library = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = (checkout / "kernels" if kind == "editable" else library) / "fillm_kernels"
    built.mkdir(parents=True, exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("_C", "_CUDA"):
        (built / f"{name}{suffix}").write_bytes(b"of another version")
    dead = str(tmp_path / "no-such-compiler")
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
    run("-c", code, cwd=checkout, CXX=dead, CC=dead, FILLM_CUDA="OFF")
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    assert not list(built.glob("*.so"))


@pytest.mark.parametrize(
    ("option", "succeeds", "words"),
    [
        ("AUTO", True, "fillm_kernels._CUDA is left out"),
        ("ON", False, "there is no CUDA compiler that works"),
        ("OFF", True, "Configuring done"),
        ("maybe", False, "FILLM_CUDA must be AUTO, ON or OFF; got 'maybe'"),
    ],
)
def test_what_cmake_does_without_nvcc(option: str, succeeds: bool, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFILLM_CUDA={option}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
    environment = {**os.environ, "CUDACXX": str(tmp_path / "no-such-nvcc")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    assert words in " ".join((done.stdout + done.stderr).split())


def test_lint_pins_agree() -> None:
    [pin] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff==")]
    assert f'"{pin}"' in (ROOT / "pyproject.toml").read_text()
    assert f"rev: v{pin.removeprefix('ruff==')}" in (ROOT / ".pre-commit-config.yaml").read_text()
