"""The CUDA kernels on the CPU: their unchanged source, compiled for the machine of csrc/cuda/host."""

import functools
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
# (multiprocessors, resident blocks, seed): one block after the other in order; many at a time, in any order.
MACHINES = ((3, 1, 0), (1, 4, 11), (7, 3, 12))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@functools.cache
def extension() -> ModuleType:
    """`_CUDA_HOST`, built once a process in a temporary folder; what the file system holds of it goes at once."""
    import ninja
    import pybind11

    with tempfile.TemporaryDirectory() as folder:
        configure = [
            *("-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DFILLM_PYTHON=OFF", "-DFILLM_CUDA_HOST=ON"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
        ]
        _run(sys.executable, "-m", "cmake", *configure)
        _run(sys.executable, "-m", "cmake", "--build", folder, "--target", "_CUDA_HOST")
        path = Path(folder) / f"_CUDA_HOST{sysconfig.get_config_var('EXT_SUFFIX')}"
        spec = importlib.util.spec_from_file_location("_CUDA_HOST", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@contextmanager
def machine(multiprocessors: int, resident: int, seed: int) -> Iterator[None]:
    """Another machine than the plainest for a while."""
    extension().set_machine(multiprocessors=multiprocessors, resident=resident, seed=seed)
    try:
        yield
    finally:
        extension().set_machine(multiprocessors=3, resident=1, seed=0)
