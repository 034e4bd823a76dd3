"""The CUDA C++ kernels compiled by nvcc for GPUs, where there is one; what is read of them needs none."""

import shutil

import pytest
from fillm_kernels import compile_check, cuda_check
from fillm_kernels.cuda_check import ARCHITECTURES, SOURCES, Usage, missing, read_ptxas, usages

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
PRINTED = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5fillm4goodIfLi2048EEEvPKfPf' for 'sm_90a'
ptxas info    : Function properties for _ZN5fillm4goodIfLi2048EEEvPKfPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 100 bytes smem
ptxas info    : Compiling entry function '_ZN5fillm3badILb1ELi262144EEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN5fillm3badILb1ELi262144EEEvPf
    24 bytes stack frame, 40 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
"""
SPILLING = """
template <int kShared>
__global__ void __launch_bounds__(1024, 2) greedy(const float* from, float* to) {
    float held[64];
#pragma unroll
    for (int k = 0; k < 64; ++k) held[k] = from[threadIdx.x + 1024 * k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 64; ++k) to[threadIdx.x + 1024 * k] = held[63 - k] * held[k];
}
template __global__ void greedy<0>(const float*, float*);
"""


def assert_meets_the_gates(target: str) -> None:
    rows = [compile_check.read_cuda(usage, target) for usage in usages(SOURCES, target)]
    assert len(rows) == len({row.kernel for row in rows})
    # 8 kernels of parts and 2 sums; the first digit, the next ones and the bits of three widths, but for 16 bits, whose
    # first digit is the last; the descent.
    assert [sum(row.kernel.startswith(f"cuda {file}:") for row in rows) for file in ("sketch", "top_mask")] == [10, 9]
    for row in rows:
        assert row.verdict == "ok" and row.stack == row.spills == 0, row
        assert 0 < row.registers <= 64 and 0 < row.shared <= row.shared_limit and row.target == ARCHITECTURES[target]


@needs_nvcc
def test_every_kernel_compiles_for_sm_90a_without_spills():
    assert_meets_the_gates("sm_90")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in ARCHITECTURES if name != "sm_90"])
def test_every_kernel_compiles_for_the_other_targets_without_spills(target):
    assert_meets_the_gates(target)


def test_what_ptxas_prints_is_read_and_judged(monkeypatch):
    monkeypatch.setattr(cuda_check, "_readable", lambda mangled: mangled)
    good, bad = read_ptxas(PRINTED, "op")
    assert good == Usage("cuda op: _ZN5fillm4goodIfLi2048EEEvPKfPf", 32, 0, 0, 2148)
    assert bad == Usage("cuda op: _ZN5fillm3badILb1ELi262144EEEvPf", 255, 24, 76, 262144)
    assert compile_check.read_cuda(good, "sm_90").verdict == "ok"
    assert compile_check.read_cuda(bad, "sm_90").verdict == "76 spills, stack of 24 bytes, too much shared memory"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no demangler")
def test_names_are_those_of_the_source():
    good, bad = read_ptxas(PRINTED, "op")
    assert (good.kernel, bad.kernel) == ("cuda op: good<float>", "cuda op: bad<true>")


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="nothing this check can read"):
        read_ptxas(PRINTED.replace("bytes stack frame", "octets"), "op")
    with pytest.raises(ValueError, match="is not its shared memory"):
        read_ptxas(PRINTED.replace("Li2048EEE", "EE"), "op")
    assert read_ptxas("ptxas info    : 0 bytes gmem", "op") == []


def test_what_is_missing_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert missing(SOURCES) is None
    assert "--cuda-sources names" in missing(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing(SOURCES) == "there is no nvcc on PATH"


@needs_nvcc
def test_a_file_that_does_not_compile_and_a_kernel_that_spills_fail_the_check(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken() { nothing; }\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"nvcc does not compile broken.cu for sm_90a: [\s\S]*nothing"):
        list(usages(tmp_path, "sm_90"))
    (tmp_path / "broken.cu").unlink()
    (tmp_path / "greedy.cu").write_text(SPILLING, encoding="utf-8")
    [usage] = usages(tmp_path, "sm_90")
    assert "spills" in compile_check.read_cuda(usage, "sm_90").verdict
