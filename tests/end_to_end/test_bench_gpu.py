"""`python -m benchmarks.gpu`, small and without a GPU: so that it runs when there is one."""

import csv

import pytest
import torch

from benchmarks import gpu
from benchmarks.kernels.gpu_cases import cases


def test_every_op_is_checked_and_timed_and_the_model_is_ranked(tmp_path):
    assert gpu.main(["--device", "cpu", "--shrink", "128", "--out", str(tmp_path)]) == 0
    with (tmp_path / "gpu_ops.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = {case.op for case in cases(torch.device("cpu"), 128)}
    assert {row["op"] for row in rows} == wanted and len(wanted) == 8
    for row in rows:
        assert 0.0 <= float(row["relative_error"]) < 1e-3 and float(row["milliseconds"]) > 0.0 and row["commit"]
    with (tmp_path / "gpu_rank.csv").open(encoding="utf-8") as file:
        ranked = list(csv.DictReader(file))
    assert [row["what"] for row in ranked] == 2 * ["plain", "certified", "with u"]


def test_an_op_that_is_off_gets_no_time_and_fails_the_run(tmp_path, monkeypatch):
    right = gpu.error_of
    monkeypatch.setattr(gpu, "error_of", lambda case: float("nan") if case.op == "soir_sweep" else right(case))
    arguments = ["--device", "cpu", "--shrink", "128", "--only", "soir_sweep,top_mask", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    with (tmp_path / "gpu_ops.csv").open(encoding="utf-8") as file:
        verdicts = {row["op"]: (row["verdict"], row.get("milliseconds", "")) for row in csv.DictReader(file)}
    assert verdicts["soir_sweep"][0].startswith("WRONG") and verdicts["soir_sweep"][1] == ""
    assert verdicts["top_mask"][1] != ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2 and "--device cpu" in capsys.readouterr().err
