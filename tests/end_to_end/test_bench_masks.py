"""`python -m benchmarks.masks` on a shape that takes a moment."""

import csv

import pytest
import torch

from benchmarks.masks import __main__ as bench


def test_the_shape_is_that_of_the_model_it_is_called_after():
    tensors = bench.tensors_of("8b")
    assert sum(tensor.numel for tensor in tensors) == 8_030_261_248 and len(tensors) == 291
    assert [tensor.name for tensor in tensors] == sorted(tensor.name for tensor in tensors)


def test_scores_are_the_same_at_every_read():
    tensors = bench.tensors_of("tiny")
    scores = bench.SimulatedScores(tensors)
    for tensor in tensors[:3]:
        one, two = (torch.cat(list(scores.pieces(tensor.name))) for _ in range(2))
        assert torch.equal(one, two) and one.shape == (tensor.numel,)


def test_a_row_says_what_it_took(tmp_path):
    bench.main(["--shape", "tiny", "--fraction", "0.25", "--verify", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert int(row["selected"]) == int(row["weights"]) // 4
    assert int(row["bytes on disk"]) > int(row["weights"]) // 16 and int(row["peak resident bytes"]) > 0
    assert float(row["smallest chosen score"]) >= float(row["largest score left"])


def test_a_wrong_mask_is_no_result(monkeypatch):
    monkeypatch.setattr(bench, "bounds", lambda *given: (1.0, 2.0))
    with pytest.raises(SystemExit, match="the mask is wrong"):
        bench.main(["--shape", "tiny", "--verify"])
