"""Builds `fillm_kernels._C` and `fillm_kernels._CUDA` with CMake and ninja; the rest is in pyproject.toml.

Without a compiler the install goes on: the library then runs on torch's operators, slower, and says so. Set
FILLM_REQUIRE_NATIVE=1 to make a failed build an error. FILLM_CUDA=AUTO (the default) builds `_CUDA` where nvcc works,
ON makes a failure an error, OFF leaves it out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = ROOT / "kernels" / "fillm_kernels"
CUDA = os.environ.get("FILLM_CUDA", "AUTO")
if CUDA not in ("AUTO", "ON", "OFF"):
    sys.exit(f"FILLM_CUDA must be AUTO, ON or OFF; got {CUDA!r}")


class CMakeBuild(build_ext):
    """Hands the extensions to CMake instead of to a compiler, one target each."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        cuda = extension.name.endswith("_CUDA")
        # What an earlier build left must not be taken for what this one makes, least of all where it makes nothing.
        for left in (target, PACKAGE / target.name) if self.editable_mode else (target,):
            left.unlink(missing_ok=True)
        try:
            self._build(Path(self.build_temp).resolve(), target, cuda)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if CUDA == "ON" if cuda else os.environ.get("FILLM_REQUIRE_NATIVE") == "1":
                raise
            runs = "CUDA tensors will run on Triton" if cuda else "fillm_kernels will run on torch's operators"
            line = "=" * 100
            notice = f"{extension.name} was NOT built: {error}\n{runs}, slower."
            print(f"{line}\n{notice}\n{line}", file=sys.stderr, flush=True)

    def _build(self, folder: Path, target: Path, cuda: bool) -> None:
        if cuda and CUDA == "OFF":
            return
        self._configure(folder, target.parent)
        if cuda and "FILLM_BUILDS_CUDA:INTERNAL=ON" not in (folder / "CMakeCache.txt").read_text(encoding="utf-8"):
            print("No nvcc that works: fillm_kernels._CUDA is left out", flush=True)
            return
        subprocess.run(
            [*_tool("cmake"), "--build", str(folder), "--target", "_CUDA" if cuda else "_C"],
            check=True,
        )
        if not target.exists():
            raise OSError(f"the build ended without {target.name}")

    def _configure(self, folder: Path, output: Path) -> None:
        import pybind11

        folder.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        configure = [
            *_tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={_ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DFILLM_CUDA={CUDA}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        subprocess.run(configure, check=True)


def _tool(name: str) -> list[str]:
    """The tool of the Python package of that name, else the one on PATH."""
    try:
        __import__(name)
    except ImportError:
        return [name]
    return [sys.executable, "-m", name]


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def _version() -> str:
    text = (ROOT / "fillm" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


setup(
    version=_version(),
    ext_modules=[Extension(f"fillm_kernels.{name}", sources=[], optional=True) for name in ("_C", "_CUDA")],
    cmdclass={"build_ext": CMakeBuild},
)
