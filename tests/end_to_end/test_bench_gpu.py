"""`python -m benchmarks.gpu`, small and without a GPU: so that it runs when there is one."""

import csv

import fillm_kernels as fk
import pytest
import torch
from fillm_kernels import dispatch
from transformers import LlamaForCausalLM

from benchmarks import gpu
from benchmarks.gpu_ranking import MASK_SHARE, SHAPES, masked_step, matrix_flop, random_samples
from benchmarks.kernels import gpu_peers
from benchmarks.kernels.gpu_calls import TOLERANCE, Call, excess_of, registered
from benchmarks.kernels.gpu_cases import cases
from benchmarks.kernels.gpu_checks import DTYPES, checks
from benchmarks.kernels.gpu_timing import Clock
from benchmarks.masked_training import some_rows

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--shrink", "128", "--seed", "0", "--minutes", "60"]


def rows_of(folder, name):
    with (folder / f"gpu_{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_no_op_is_forgotten():
    """A new op fails here until it has its rows."""
    ops = {*fk.backends(), "outer_sketch"}
    assert {call.op for call in checks(CPU, few=True)} == ops == {case.op for case in cases(CPU, 128)}
    assert {registered(op) for op in ops} == set(fk.backends())
    for op in ops:
        assert {call.dtype for call in checks(CPU) if call.op == op} == set(DTYPES), op


def test_reduced_cases_are_the_same_cases():
    for full, reduced in zip(cases(CPU), cases(CPU, reduced=True), strict=True):
        assert (full.op, full.dtype, full.target) == (reduced.op, reduced.dtype, reduced.target)
        assert reduced.bytes <= full.bytes and reduced.flop <= full.flop


@pytest.mark.slow
def test_every_op_is_checked_and_timed_and_the_models_are_ranked(tmp_path):
    assert gpu.main([*SMALL, "--out", str(tmp_path)]) == 0
    correct, timed = rows_of(tmp_path, "correct"), rows_of(tmp_path, "ops")
    assert {row["op"] for row in correct} == {row["op"] for row in timed} == {*fk.backends(), "outer_sketch"}
    for row in correct:
        assert row["verdict"] == "right" and row["backend"] == "cpu" and row["commit"] and row["seed"] == "0"
    for row in timed:
        assert float(row["milliseconds"]) > 0.0 and float(row["of_floor"]) > 0.0, row
        assert float(row["relative_error"]) <= float(row["allowed"]) and row["verdict"] in (
            "reached",
            "below target",
            "no target",
        )
    peers = rows_of(tmp_path, "peers")
    assert {row["peer"] for row in peers} == set(gpu_peers.PEERS)
    assert all(float(row["peer / sketch"]) > 0.0 for row in peers if row["peer"] == "index_add_")
    ranked = rows_of(tmp_path, "rank")
    runs = sum(len(shape.dtypes) for shape in SHAPES)
    assert [row["what"] for row in ranked] == runs * ["plain", "certified", "with u", "factored-sjlt", "masked step"]
    for row in ranked:
        taken = float(row["samples"]) / float(row["samples_per_second"])
        share = float(row["matrix_flop"]) / taken / float(row["matrix_ceiling"])
        assert float(row["flop_utilisation"]) == pytest.approx(share)


def test_an_op_that_is_off_gets_no_time_and_fails_the_run(tmp_path, monkeypatch):
    right = gpu.excess_of
    monkeypatch.setattr(
        gpu, "excess_of", lambda call: (float("nan"), TOLERANCE) if call.op == "soir_sweep" else right(call)
    )
    assert gpu.main([*SMALL, "--only", "soir_sweep,masked_norm", "--out", str(tmp_path)]) == 1
    assert all(
        row["verdict"].startswith("WRONG") == (row["op"] == "soir_sweep") for row in rows_of(tmp_path, "correct")
    )
    for row in rows_of(tmp_path, "ops"):
        assert (row["milliseconds"] == "") == (row["op"] == "soir_sweep"), row
        assert row["verdict"].startswith("not timed") == (row["op"] == "soir_sweep")


def test_wrong_only_at_full_size_is_seen():
    case = next(case for case in cases(CPU, 128) if case.op == "masked_norm")
    off = type(case)(**{**vars(case), "spot": lambda given: 1.0})
    row = gpu.measure(off, case, {}, CPU)
    assert row["verdict"].startswith("WRONG") and "full size" in row["verdict"] and "milliseconds" not in row


def test_a_case_that_breaks_or_lacks_memory_is_a_row_and_hides_no_other(tmp_path, monkeypatch):
    right = gpu.excess_of

    def broken(call):
        if call.op == "masked_norm":
            raise torch.OutOfMemoryError("no memory left")
        if call.op == "top_mask":
            raise RuntimeError("launch\nfailed")
        return right(call)

    monkeypatch.setattr(gpu, "excess_of", broken)
    assert gpu.main([*SMALL, "--only", "masked_norm,top_mask,soir_sweep", "--out", str(tmp_path)]) == 1
    verdicts = {row["op"]: row["verdict"] for row in rows_of(tmp_path, "correct")}
    assert verdicts["masked_norm"] == "left out: out of memory: no memory left"
    assert verdicts["top_mask"] == "FAILED: RuntimeError: launch failed" and verdicts["soir_sweep"] == "right"
    assert {row["op"] for row in rows_of(tmp_path, "ops") if row["milliseconds"]} == {"soir_sweep"}


def test_a_backend_that_is_forced_and_not_there_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    right = gpu.excess_of

    def refused(call):
        if call.op == "masked_norm":
            raise fk.BackendError("FILLM_BACKEND=torch: masked_norm has no such backend")
        return right(call)

    monkeypatch.setattr(gpu, "excess_of", refused)
    assert gpu.main([*SMALL, "--only", "masked_norm,top_mask", "--out", str(tmp_path)]) == 0
    for row in rows_of(tmp_path, "correct") + rows_of(tmp_path, "ops"):
        if row["op"] == "masked_norm":
            assert row["verdict"] == "left out: FILLM_BACKEND=torch: masked_norm has no such backend"
        else:
            assert row["backend"] == "torch" and row["relative_error"]


def test_what_does_not_fit_in_the_time_is_listed(tmp_path):
    arguments = ["--device", "cpu", "--shrink", "128", "--minutes", "0", "--only", "top_mask,rank,peers"]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    for name in ("correct", "ops", "peers", "rank"):
        rows = rows_of(tmp_path, name)
        assert rows and {row["verdict"] for row in rows} == {"left out: time"}, name


def test_a_refused_backend_is_in_the_row_with_its_figures(monkeypatch):
    why = "self-check on cuda:0 in bfloat16: off from the reference by 3.0e-01 relative"
    monkeypatch.setitem(dispatch._self_checks._failures, ("top_mask", "triton"), why)
    found = gpu.backend_of("top_mask", torch.device("cuda"))
    assert found == {"backend": "torch", "refused": f"triton: {why}"}


def test_an_error_is_measured_per_tensor_and_nan_is_the_worst():
    def run(a, b):
        return a, b * torch.tensor([1.0, 1.001])

    call = Call(op="x", label="", dtype=torch.float32, run=run, inputs=lambda: {"a": torch.ones(9), "b": torch.ones(2)})
    assert excess_of(call) == (0.0, TOLERANCE)  # the same function twice
    calls = iter([1.0, 2.0])
    changing = Call(**{**vars(call), "run": lambda a, b: (a, b * next(calls))})
    assert excess_of(changing)[0] == pytest.approx(0.5)
    numbers = iter([float("nan"), 1.0])
    poisoned = Call(**{**vars(call), "run": lambda a, b: (a * next(numbers), b)})
    assert not excess_of(poisoned)[0] <= TOLERANCE


def test_a_peer_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(gpu_peers, "import_module", lambda name: __import__("no_such_package_" + name))
    rows = [row for row in gpu_peers.peer_rows(CPU, 128, Clock(10), 1.0) if row["peer"].startswith(("sjlt", "fast_jl"))]
    assert rows and all(row["verdict"].startswith("left out: not installed") for row in rows)


def ranked_sets():
    return tuple(random_samples(7, 256, seed) for seed in (1, 2))


def test_flop_of_plain_is_that_of_the_shapes_and_the_ranking_costs_what_its_products_do():
    """Two batches of 7 rows of 112 tokens: 6 FLOP a weight and token, of the head where loss is, and attention."""
    shape = SHAPES[0]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config(128))
    flop = matrix_flop(model, ranked_sets())
    body = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = model.config.vocab_size * model.config.hidden_size
    answered = sum(sample.num_counted for samples in ranked_sets() for sample in samples)
    attention = model.config.num_hidden_layers * model.config.num_attention_heads * model.config.head_dim
    expected = 6.0 * body * 2 * 7 * 112 + 6.0 * head * answered + 3 * 4.0 * attention * 2 * 7 * 112**2
    assert flop["plain"] == flop["masked step"] == pytest.approx(expected)
    weights = 2.0 * (body * 7 * 112 + head * answered / 2)  # one product over one set
    assert flop["with u"] - flop["certified"] == pytest.approx(weights)
    assert flop["factored-sjlt"] < flop["certified"]


def test_a_masked_step_changes_the_selected_rows_and_nothing_else():
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES[0].config(128)).eval().requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    masked_step(model, ranked_sets())()
    mask = some_rows(model, MASK_SHARE)
    for name, parameter in model.named_parameters():
        changed = (parameter != before[name]).flatten(1).any(1) if parameter.ndim == 2 else (parameter != before[name])
        rows = changed.nonzero().flatten().tolist()
        assert set(rows) <= (set(mask[name].rows.tolist()) if name in mask else set()), name
        assert parameter.grad is None and not parameter.requires_grad
    assert any(bool((p != before[name]).any()) for name, p in model.named_parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2 and "--device cpu" in capsys.readouterr().err


def test_a_name_that_does_not_exist_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*SMALL, "--only", "sketch,skecth", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "--only skecth: not among" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
