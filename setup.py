"""Builds `fillm_kernels._C` with CMake and ninja; everything else about the package is in pyproject.toml.

Without a compiler the install goes on: the library then runs on torch's operators, slower, and says so. Set
FILLM_REQUIRE_NATIVE=1 to make a failed build an error.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Hands the one extension to CMake instead of to a compiler."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        try:
            self._build(Path(self.build_temp).resolve(), target)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("FILLM_REQUIRE_NATIVE") == "1":
                raise
            line = "=" * 100
            notice = f"{extension.name} was NOT built: {error}\nfillm_kernels will run on torch's operators, slower."
            print(f"{line}\n{notice}\n{line}", file=sys.stderr, flush=True)

    def _build(self, folder: Path, target: Path) -> None:
        import pybind11

        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            *_tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={_ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([*_tool("cmake"), "--build", str(folder)], check=True)
        if not target.exists():
            raise OSError(f"the build ended without {target.name}")


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
    ext_modules=[Extension("fillm_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
