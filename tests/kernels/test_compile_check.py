"""Ahead-of-time compilation, in processes of its own: this one runs Triton kernels in the interpreter."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fillm_kernels
import pytest
from fillm_kernels import compile_check
from fillm_kernels.compile_check import TARGETS, read_amdgcn

pytest.importorskip("triton")
KERNELS = Path(fillm_kernels.__file__).parents[1]


def run(code_or_module: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A cache of its own: what an earlier run compiled proves nothing about this source.
    environment = {**kept, "PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(folder / "cache"), **environment}
    return subprocess.run([sys.executable, *code_or_module], env=environment, capture_output=True, text=True)


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(["-m", "fillm_kernels.compile_check", *options], folder)


def rows_of(file: Path) -> list[dict[str, str]]:
    """Rows of Triton kernels; those of CUDA C++ are there only where nvcc is, and have tests of their own."""
    with file.open(newline="", encoding="utf-8") as opened:
        return [row for row in csv.DictReader(opened) if not row["kernel"].startswith("cuda ")]


def test_one_case_of_every_kernel_compiles_for_sm_90(tmp_path):
    done = check(tmp_path, "--target", "sm_90", "--quick", "--csv", str(tmp_path / "rows.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "rows.csv")
    assert done.stdout.splitlines()[-1].endswith(" compiled, 0 failed")
    assert {row["target"] for row in rows} == {"sm_90"}
    matrix = [row for row in rows if "HGMMA" in row["matrix"]]
    assert {row["kernel"].split()[0] for row in matrix} >= {
        "ghost_norm",
        "ghost_dot",
        "ghost_gram",
        "sample_moments",
        "weighted_outer_",
        "factored_sketch",
    }
    assert {row["kernel"].split()[0] for row in rows} >= {
        "tensorsketch",
        "soir_sweep",
        "top_mask",
        "masked_norm",
        "masked_adamw_",
    }
    for row in rows:
        assert 0 < int(row["registers"]) <= 255 and row["stack"] == row["spills"] == "0" and row["verdict"] == "ok"
        assert 0 <= int(row["shared"]) <= int(row["shared_limit"]) == 227 * 1024
    assert all(int(row["shared"]) > 0 for row in matrix)  # operands of matrix units pass through it


@pytest.mark.slow
def test_every_kernel_parses_where_a_launch_takes_an_argument_of_one_for_a_constant(tmp_path):
    # Seeds, strides and counts of 1 become Python integers in a kernel, whose methods are not a tensor's.
    code = (
        "from fillm_kernels import compile_check as c\n"
        "different = {(case.kernel.__name__, str(case.constants)): case for case in c.cases()}.values()\n"
        "print(sum(len(c.parse_ones(case, c.TARGETS['sm_90'])) for case in different))\n"
    )
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
    bad = (
        "import triton, triton.language as tl\nfrom fillm_kernels import compile_check as c\n"
        "from fillm_kernels.triton.configurations import CompileCase, Configuration\n"
        "@triton.jit\ndef kernel(p, n):\n    tl.store(p, n.to(tl.int64))\n"
        "case = CompileCase('bad', kernel, Configuration({}, 1, 1), {'p': '*i64', 'n': 'i32'})\n"
        "c.parse_ones(case, c.TARGETS['sm_90'])\n"
    )
    script = tmp_path / "bad.py"
    script.write_text(bad, encoding="utf-8")
    done = run([str(script)], tmp_path)
    assert done.returncode != 0 and "has no attribute 'to'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(target, tmp_path):
    # All of them for the NVIDIA device with least shared memory and for the one they were chosen for; of the
    # others, which take as long, a case of every kernel. The command without --quick compiles all for all.
    some = [] if target in ("sm_80", "sm_90") else ["--quick"]
    done = check(tmp_path, "--target", target, *some, "--csv", str(tmp_path / "rows.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["target"] for row in rows} == {target}
    assert len({row["kernel"] for row in rows}) == len(rows)
    assert some or len(rows) == len(compile_check.cases())


BAD_KERNELS = """
import sys
import triton
import triton.language as tl
from fillm_kernels import compile_check
from fillm_kernels.triton.configurations import CompileCase, Configuration

@triton.jit
def greedy(a_ptr, b_ptr, out_ptr, width, stride, M: tl.constexpr, K: tl.constexpr):
    r = tl.arange(0, M)
    total = tl.zeros((M, M), tl.float32)
    for k in range(0, width, K):
        f = k + tl.arange(0, K)
        a = tl.load(a_ptr + r[:, None] * stride + f[None, :])
        b = tl.load(b_ptr + r[:, None] * stride + f[None, :])
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    tl.store(out_ptr + r[:, None] * M + r[None, :], total)

def case(dtype, m, k, warps, stages):
    types = {"a_ptr": dtype, "b_ptr": dtype, "out_ptr": "*fp32", "width": "i32", "stride": "i32"}
    return CompileCase("greedy", greedy, Configuration({"M": m, "K": k}, warps, stages), types, {}, True)

CASES = {
    "spills": case("*bf16", 256, 64, 4, 1),
    "shared": case("*bf16", 128, 256, 8, 4),
    "matrix": case("*fp32", 64, 16, 4, 2),
}
compile_check.cases = lambda: [CASES[sys.argv[1]]]
sys.exit(compile_check.main(["--target", "sm_90", "--cuda-sources", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        pytest.param("spills", "spills, stack of", marks=pytest.mark.slow),
        ("shared", "too much shared memory"),
        ("matrix", "no HGMMA"),
    ],
)
def test_a_configuration_that_breaks_a_gate_fails_the_check(kind, words, tmp_path):
    script = tmp_path / "bad.py"  # Triton reads a kernel's source from its file
    script.write_text(BAD_KERNELS, encoding="utf-8")
    done = run([str(script), kind, str(tmp_path)], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout
    assert done.stdout.splitlines()[-1] == "1 compiled, 1 failed"


def test_a_case_that_does_not_fit_its_kernel_is_an_error(tmp_path):
    code = (
        "from dataclasses import replace\nfrom fillm_kernels import compile_check as c\n"
        "case = c.cases()[0]\nc.compile_case(replace(case, types={**case.types, 'absent': 'i32'}), c.TARGETS['sm_90'])"
    )
    done = run(["-c", code], tmp_path)
    assert done.returncode != 0 and "the case and the kernel differ in {'absent'}" in done.stderr


def test_under_the_interpreter_or_without_a_match_the_command_says_so(tmp_path):
    done = run(["-m", "fillm_kernels.compile_check"], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1 replaces the compiler" in done.stderr
    done = check(tmp_path, "--kernel", "nothing", "--target", "gfx942")
    assert done.returncode == 2 and "no kernel's name contains 'nothing'" in done.stderr


def test_without_triton_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        compile_check.main([])
    assert stopped.value.code == 2 and "triton is not installed; pip install" in capsys.readouterr().err


def test_amd_metadata_is_read_and_its_absence_is_an_error():
    text = "  v_mfma_f32_32x32x8_bf16 a, b\n  v_mfma_f32_32x32x8_bf16 a, b\n    .private_segment_fixed_size: 4\n"
    text += "    .sgpr_spill_count: 2\n    .vgpr_count:     99\n    .vgpr_spill_count: 3\n"
    assert read_amdgcn(text) == (99, 4, 5, {"v_mfma_f32_32x32x8_bf16": 2})
    with pytest.raises(ValueError, match="lacks vgpr_count, "):
        read_amdgcn("    .private_segment_fixed_size: 0\n")


def test_sections_of_the_report_are_kept_apart():
    assert compile_check.LOCAL_MEMORY.findall("LDL.64 R1; STL [R2]; LDG R3; LDSM R4") == ["LDL", "STL"]
    found = compile_check.MATRIX_INSTRUCTIONS.findall("HGMMA.64x128x16.F32 R1; UTCHMMA gdesc; HMMA.16816 R2; FFMA R3")
    assert found == ["HGMMA", "UTCHMMA", "HMMA"]
