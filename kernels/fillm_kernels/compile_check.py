"""`python -m fillm_kernels.compile_check`: compile every shipped Triton configuration, and read what came of it.

No GPU is needed. Each module of `fillm_kernels.triton` that has `compile_cases` takes part. A configuration fails if it
spills registers, has a stack, asks for more shared memory than the target has, or, where its products are of bfloat16
or float16 matrices, does not run them on the target's matrix units. Where nvcc and the CUDA sources are, those are
compiled too (cuda_check.py).
"""

import argparse
import csv
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fillm_kernels import cuda_check
from fillm_kernels.dispatch import interpreted


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        backend: Triton's name of the compiler backend.
        architecture: what Triton calls the architecture.
        threads: threads of a warp.
        shared_limit: bytes of shared memory a block can have.
        matrix_units: pattern of the instructions that bfloat16 and float16 products must use.
    """

    backend: str
    architecture: int | str
    threads: int
    shared_limit: int
    matrix_units: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, r"HMMA"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, r"HGMMA"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, r"UTC\w*MMA"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, r"v_mfma\w+"),
}
MATRIX_INSTRUCTIONS = re.compile(r"\b(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA|v_mfma\w+)\b")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Row:
    """One configuration on one target.

    Attributes:
        kernel: op, kernel and element type.
        target: name of the target.
        registers: 32-bit registers a thread (vector registers on gfx942).
        stack: bytes of stack a thread.
        spills: LDL and STL instructions, or registers spilled on gfx942.
        shared: bytes of shared memory a block.
        shared_limit: bytes there are.
        matrix: matrix instructions in the machine code, by name.
        verdict: `ok`, or what fails.
    """

    kernel: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    matrix: str
    verdict: str


def cases() -> list[Any]:
    """The compile cases of every module of `fillm_kernels.triton`, in the order of the modules' names."""
    package = importlib.import_module("fillm_kernels.triton")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]


def one_per_kernel(every: Sequence[Any]) -> list[Any]:
    """One case per kernel: its first with matrix products if it has any, else its first."""
    chosen: dict[Any, Any] = {}
    for case in every:
        if case.kernel not in chosen or (case.matrix and not chosen[case.kernel].matrix):
            chosen[case.kernel] = case
    return list(chosen.values())


def compile_case(case: Any, target: Target) -> Any:
    """Compile a case as a launch on the target would; Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    destination = GPUTarget(target.backend, target.architecture, target.threads)
    return triton.compile(source_of(case), target=destination, options=case.configuration.options())


def source_of(case: Any, ones: Sequence[str] = ()) -> Any:
    """What Triton compiles for a case; the parameters named in `ones` are 1, which a launch turns into a constant."""
    from triton.compiler import ASTSource

    constants = {**case.configuration.constants, **case.constants}
    parameters = case.kernel.arg_names
    if set(parameters) != {*case.types, *constants}:
        raise ValueError(
            f"{case.name}: the case and the kernel differ in {set(parameters) ^ {*case.types, *constants}}"
        )
    types = {name: type for name, type in case.types.items() if name not in ones}
    signature = {name: types.get(name, "constexpr") for name in parameters}
    sized = [name for name, type in types.items() if type.startswith(("*", "i")) and name not in case.counts]
    hinted = sized if case.aligned else []
    hints = {(parameters.index(name),): [["tt.divisibility", 16]] for name in hinted}
    return ASTSource(case.kernel, signature, constexprs={**constants, **dict.fromkeys(ones, 1)}, attrs=hints)


def parse_ones(case: Any, target: Target) -> list[str]:
    """Parse a case with each of its integer parameters being 1 in turn: no GPU is needed to meet what a launch does.

    Returns:
        The parameters so tried: all integers that the kernel does not exempt with `do_not_specialize`.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    destination = GPUTarget(target.backend, target.architecture, target.threads)
    backend = make_backend(destination)
    options = backend.parse_options(case.configuration.options())
    exempt = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    tried = [name for name, type in case.types.items() if type in ("i32", "i64") and name not in exempt]
    for name in tried:
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        source_of(case, [name]).make_ir(destination, options, functions, modules, context)
    return tried


def read(case: Any, name: str) -> Row:
    """Compile a case for a target and read registers, memory and instructions from the machine code."""
    target = TARGETS[name]
    compiled = compile_case(case, target)
    report = read_cubin(compiled.asm["cubin"]) if target.backend == "cuda" else read_amdgcn(compiled.asm["amdgcn"])
    registers, stack, spills, instructions = report
    shared = compiled.metadata.shared
    matrix = " ".join(f"{instruction}:{count}" for instruction, count in sorted(instructions.items()))
    missing = case.matrix and not any(re.fullmatch(target.matrix_units, found) for found in instructions)
    verdict = _verdict(target, stack, spills, shared, f"no {target.matrix_units}" if missing else "")
    return Row(case.name, name, registers, stack, spills, shared, target.shared_limit, matrix, verdict)


def read_cuda(usage: cuda_check.Usage, name: str) -> Row:
    """The row of a CUDA C++ kernel, which nvcc has compiled for a target; spills are in bytes."""
    target = TARGETS[name]
    verdict = _verdict(target, usage.stack, usage.spills, usage.shared)
    numbers = (usage.registers, usage.stack, usage.spills, usage.shared, target.shared_limit)
    return Row(usage.kernel, cuda_check.ARCHITECTURES[name], *numbers, "", verdict)


def _verdict(target: Target, stack: int, spills: int, shared: int, other: str = "") -> str:
    faults = [
        f"{spills} spills" if spills else "",
        f"stack of {stack} bytes" if stack else "",
        "too much shared memory" if shared > target.shared_limit else "",
        other,
    ]
    return ", ".join(fault for fault in faults if fault) or "ok"


def read_cubin(cubin: bytes) -> tuple[int, int, int, Counter[str]]:
    """Registers, stack bytes, LDL and STL instructions, and matrix instructions, of an NVIDIA binary."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None or "EXIT" not in code:
        raise ValueError(f"cuobjdump or nvdisasm printed nothing this check can read: {usage[:200]!r}")
    return int(found[1]), int(found[2]), len(LOCAL_MEMORY.findall(code)), Counter(MATRIX_INSTRUCTIONS.findall(code))


def read_amdgcn(assembly: str) -> tuple[int, int, int, Counter[str]]:
    """Vector registers, private bytes, spilled registers, and matrix instructions, of AMD assembly with metadata."""
    fields = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    found = {field: re.search(rf"^\s*\.{field}:\s*(\d+)", assembly, re.MULTILINE) for field in fields}
    if lacking := [field for field, match in found.items() if match is None]:
        raise ValueError(f"the assembly's metadata lacks {', '.join(lacking)}")
    registers, private, vector_spills, scalar_spills = (int(match[1]) for match in found.values())
    return registers, private, vector_spills + scalar_spills, Counter(MATRIX_INSTRUCTIONS.findall(assembly))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows(options: argparse.Namespace, every: Sequence[Any], cuda: bool) -> Iterator[Row]:
    """Compile what the options ask for, one row after the other."""
    targets = options.target or list(TARGETS)
    for case in one_per_kernel(every) if options.quick else every:
        for name in targets:
            yield read(case, name)
    for name in targets if cuda else ():
        if name in cuda_check.ARCHITECTURES:
            usages = cuda_check.usages(options.cuda_sources, name)
            yield from (read_cuda(usage, name) for usage in usages if options.kernel in usage.kernel)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a row per kernel and target; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m fillm_kernels.compile_check", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all; may be repeated")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one case per kernel")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    sources = {"type": Path, "default": cuda_check.SOURCES, "metavar": "DIR"}
    parser.add_argument("--cuda-sources", **sources, help="folder of the .cu files (default: that of this checkout)")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed; pip install 'triton>=3.6' (no GPU is needed)")
    every = [case for case in cases() if options.kernel in case.name]
    if lacking := cuda_check.missing(options.cuda_sources):
        print(f"CUDA C++ kernels are left out: {lacking}", flush=True)
    compiled = []
    for row in rows(options, every, lacking is None):
        compiled.append(row)
        memory = f"shared {row.shared:>6} of {row.shared_limit}"
        counts = f"registers {row.registers:>3}  stack {row.stack}  spills {row.spills}"
        print(f"{row.kernel:<40} {row.target:<6}  {counts}  {memory}  {row.matrix or '-'}  {row.verdict}", flush=True)
    if not compiled:
        parser.error(f"no kernel's name contains {options.kernel!r}")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, asdict(compiled[0]))
            writer.writeheader()
            writer.writerows(map(asdict, compiled))
    failed = sum(row.verdict != "ok" for row in compiled)
    print(f"{len(compiled)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
