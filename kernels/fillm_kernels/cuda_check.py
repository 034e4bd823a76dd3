"""Compile the CUDA C++ kernels for every target, and read what `ptxas -v` says of them; no GPU and no link is needed.

Part of `python -m fillm_kernels.compile_check`. The sources are those of a checkout; a wheel does not carry them.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100"}
"""What nvcc is asked for, by target of the compile check."""

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_SHARED = re.compile(r"Li(\d+)EE+v")  # the last template argument: dynamic shared memory, as csrc/cuda/launch.h has it


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Attributes:
        kernel: source file, function and template arguments.
        registers: 32-bit registers a thread.
        stack: bytes of stack a thread.
        spills: bytes of spill stores and loads in the code.
        shared: bytes of shared memory a block, static and dynamic.
    """

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int


def missing(sources: Path) -> str | None:
    """Why the kernels cannot be compiled here, in words, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    if not any(sources.glob("*.cu")):
        return f"there are no CUDA sources in {sources}; --cuda-sources names the csrc/cuda of a checkout"
    return None


def usages(sources: Path, target: str) -> Iterator[Usage]:
    """Compile every file for a target and read its kernels, file by file.

    Args:
        sources: folder of the .cu files.
        target: a key of `ARCHITECTURES`.

    Raises:
        ValueError: if a file does not compile, or nvcc prints nothing that can be read; the message holds its words.
    """
    for file in sorted(sources.glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            cubin = str(Path(folder) / "kernels.cubin")
            options = ["-std=c++17", "-O3", "-cubin", f"-arch={ARCHITECTURES[target]}", "-Xptxas", "-v"]
            done = subprocess.run(["nvcc", *options, str(file), "-o", cubin], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"nvcc does not compile {file.name} for {ARCHITECTURES[target]}: {done.stderr[:2000]}")
        yield from read_ptxas(done.stderr, file.stem)


def read_ptxas(printed: str, stem: str) -> list[Usage]:
    """Kernels in what `ptxas -v` prints, in its order; none for a file without kernels."""
    found = []
    for part in re.split(r"(?=Compiling entry function)", printed)[1:]:
        entry, spills, used = (pattern.search(part) for pattern in (_ENTRY, _SPILLS, _USED))
        if entry is None or spills is None or used is None:
            raise ValueError(f"ptxas printed nothing this check can read: {part[:300]!r}")
        dynamic = _SHARED.search(entry[1])
        if dynamic is None:
            raise ValueError(f"the last template argument of {entry[1]} is not its shared memory")
        stack, stores, loads = map(int, spills.groups())
        shared = int(used[2] or 0) + int(dynamic[1])
        found.append(Usage(f"cuda {stem}: {_readable(entry[1])}", int(used[1]), stack, stores + loads, shared))
    return found


def _readable(mangled: str) -> str:
    """`sketch_parts<Float32Bits, true>` where there is a demangler, else the name as the compiler has it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], check=True, capture_output=True, text=True).stdout
    plain = name.replace("(anonymous namespace)::", "").replace("fillm::", "").replace("void ", "").replace("(int)", "")
    return re.sub(r"(, |<)\d+>$", lambda end: ">" if end[1] == ", " else "", plain.partition("(")[0].strip())
