import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fillm_kernels
import pytest
import torch
from fillm_kernels import BackendError, backends, dispatch, ghost_dot, ghost_norm, native
from fillm_kernels.rows import nonzero_rows

OPS = {"ghost_norm", "ghost_dot", "ghost_gram", "weighted_outer_", "sample_moments"}
OPS |= {"sketch", "factored_sketch", "soir_sweep", "top_mask", "masked_norm", "masked_adamw_", "masked_sophia_"}
WITH_CUDA = {"sketch", "top_mask"}
X, OFFSETS = torch.ones(2, 3), torch.tensor([0, 2])
KERNELS = Path(fillm_kernels.__file__).parents[1]


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "refusal", "the compiled extension fillm_kernels._C is missing (test)")
    monkeypatch.setattr(dispatch, "_warned", False)


def test_backends_says_what_runs_where(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # then Triton kernels run on the CPU, where asked for by name
    report = backends()
    assert set(report) == OPS
    for op, entry in report.items():
        if op in WITH_CUDA:
            assert entry["refused"].pop("cuda").startswith("runs on cuda tensors only, not on cpu")
            if native.cuda_refusal() is None:
                assert entry["used"].pop("cuda") == "cuda"
                entry["used"]["cuda"] = "torch" if dispatch.interpreted() else "triton"
        # In the interpreter Triton runs on the CPU, when forced; without it, on CUDA tensors.
        if dispatch.interpreted():
            assert set(entry["available"]) == {"cpu", "triton", "torch", "reference"}
            assert entry["used"] == {"cpu": "cpu", "cuda": "torch"}
            assert entry["refused"] == {}
        else:
            assert set(entry["available"]) == {"cpu", "torch", "reference"}
            assert entry["used"] == {"cpu": "cpu", "cuda": "triton"}
            assert entry["refused"] == {"triton": "runs on cuda tensors only, not on cpu"}
        assert entry["instruction_sets"][0] == "generic"
    json.dumps(report)


def test_forced_backend_is_the_one_that_runs(monkeypatch):
    for name in ("reference", "torch", "cpu"):
        monkeypatch.setenv("FILLM_BACKEND", name)
        calls = []
        entry = dispatch._registry["ghost_norm"][name]
        spy = dispatch.Backend(lambda *a, run=entry.run, calls=calls: calls.append(1) or run(*a), entry.devices)
        monkeypatch.setitem(dispatch._registry["ghost_norm"], name, spy)
        assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]
        assert calls == [1]
        assert backends()["ghost_norm"]["used"]["cpu"] == name


def test_forced_backend_that_does_not_exist_or_cannot_run_is_an_error_in_words(monkeypatch, without_extension):
    monkeypatch.setenv("FILLM_BACKEND", "vulkan")
    with pytest.raises(
        BackendError, match=r"FILLM_BACKEND=vulkan: ghost_dot has no such backend; it has cpu, reference"
    ):
        ghost_dot(X, X, torch.ones(3, 3), OFFSETS)
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    with pytest.raises(BackendError, match="fillm_kernels._C is missing"):
        ghost_norm(X, X, OFFSETS)
    with pytest.raises(BackendError, match="runs on cpu tensors only, not on cuda"):
        dispatch.select("ghost_norm", "cuda")
    assert "FILLM_BACKEND=cpu" in backends()["ghost_norm"]["used"]["cuda"]


def test_without_the_extension_everything_works_and_one_warning_says_so(without_extension, recwarn):
    with pytest.warns(RuntimeWarning, match="fillm_kernels._C is missing .* C\\+\\+ compiler"):
        assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]
    assert ghost_norm(X, X, OFFSETS).tolist() == [36.0]
    assert ghost_dot(X, X, torch.ones(3, 3), OFFSETS).tolist() == [18.0]
    assert len(recwarn) == 0
    entry = backends()["ghost_norm"]
    assert entry["used"]["cpu"] == "torch"
    assert "missing" in entry["refused"]["cpu"]
    assert entry["instruction_sets"] == []


def test_unknown_instruction_set_is_refused():
    from fillm_kernels.ghost_norm import _cpu

    with pytest.raises(ValueError, match="no instruction set 'avx9000'"):
        _cpu(X, X, OFFSETS, "auto", "avx9000")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_that_matter(dtype):
    dy = torch.zeros(300, 301, dtype=dtype)
    dy[5, 300] = torch.finfo(dtype).tiny
    dy[7, 0] = torch.nan
    dy[9] = -0.0
    dy[299, 150] = -torch.inf
    assert nonzero_rows(dy).tolist() == [5, 7, 299]
    assert nonzero_rows(dy[:, :300]).tolist() == [7, 299]
    assert nonzero_rows(torch.zeros(4, 3, dtype=dtype)).tolist() == []
    assert nonzero_rows(torch.ones(4, 3, dtype=dtype)) is None
    assert nonzero_rows(torch.ones(0, 3, dtype=dtype)) is None


def test_importing_the_library_is_light_and_needs_nothing_of_fillm():
    code = "import sys, fillm_kernels; print([m for m in ('triton', 'transformers', 'fillm') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(KERNELS)}, cwd="/", capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(("content", "words"), [(None, "No module named 'fillm_kernels._C'"), (b"no library", "_C.")])
def test_an_extension_that_is_missing_or_broken_is_named_with_the_reason(content, words, tmp_path):
    copy = tmp_path / "fillm_kernels"
    shutil.copytree(KERNELS / "fillm_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
    # The finder of an editable install would find this checkout's extension.
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]; "
        "import fillm_kernels; print(fillm_kernels.__file__, fillm_kernels.backends()['sketch']['refused']['cpu'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, cwd="/", capture_output=True, text=True
    )
    file, _, reason = run.stdout.partition(" ")
    assert Path(file).is_relative_to(tmp_path), run.stderr
    assert (
        reason.startswith("the compiled extension fillm_kernels._C is missing or does not load (") and words in reason
    )
    assert "circular" not in reason
