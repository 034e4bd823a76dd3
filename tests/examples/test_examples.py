"""The examples run as their first lines say, and compute what they claim."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fillm_kernels import sketch
from fillm_kernels.seed_law import tensor_seed
from torch import nn

from examples.diagonal_fisher import fisher_diagonal
from examples.ghost_clipping import clipped_gradients
from examples.projected_gradients import gradients_one_by_one, projected, scores, write_store

ROOT = Path(__file__).resolve().parents[2]


def squares(output, target):
    return (output - target).square().sum(1)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_script_runs(script):
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_clipped_sum_is_that_of_gradients_taken_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2, bias=False), nn.Linear(2, 2)).double()
    model[3].weight.requires_grad_(False)  # neither counted nor summed, and still frozen afterwards
    x, target, offsets = torch.randn(11, 7).double(), torch.randn(11, 2).double(), torch.tensor([0, 1, 5, 5, 11])
    sums, norms = clipped_gradients(model, x, squares, target, offsets, max_norm=3.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in sums} == {id(parameter) for parameter in trained} and len(trained) == 4
    want = [torch.zeros_like(parameter) for parameter in trained]
    for sample, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        gradients = torch.autograd.grad(squares(model(x[begin:end]), target[begin:end]).sum(), trained)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        assert float(norms[sample]) == pytest.approx(float(norm), rel=1e-10)
        for total, gradient in zip(want, gradients, strict=True):
            total += gradient * min(1.0, 3.0 / max(float(norm), 1e-12))
    for parameter, total in zip(trained, want, strict=True):
        torch.testing.assert_close(sums[parameter], total)
        assert parameter.grad is None
    assert float(norms.max()) > 3.0 > float(norms.min())  # some were clipped


def test_a_gradient_that_would_escape_the_clipping_is_refused():
    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.Linear(4, 4))
    tied[1].weight = layer.weight
    for model, words in (
        (nn.Sequential(layer, nn.LayerNorm(4)), "1.weight does not belong"),
        (tied, "0.weight does not belong to exactly one"),
        (nn.Sequential(layer, layer), "runs twice"),
    ):
        with pytest.raises(ValueError, match=words):
            clipped_gradients(model, torch.ones(3, 4), squares, torch.ones(3, 4), torch.tensor([0, 3]), 1.0)


def test_fisher_diagonal_squares_before_it_sums():
    layer, x, dy = nn.Linear(5, 4).double(), torch.randn(9, 5).double(), torch.randn(9, 4).double()
    fisher = fisher_diagonal(layer, x, dy, torch.tensor([0, 3, 4, 9]))
    parts = [dy[a:b].T @ x[a:b] for a, b in ((0, 3), (3, 4), (4, 9))]
    torch.testing.assert_close(fisher, sum(part.square() for part in parts) / 3)


def test_projected_gradients_are_sketches_of_exact_ones_whatever_the_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 2, bias=False)).double()
    x, target, offsets = torch.randn(11, 7).double(), torch.randn(11, 2).double(), torch.tensor([0, 1, 5, 5, 11])
    exact = gradients_one_by_one(model, x, target, squares, offsets)
    for sample, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        loss = squares(model(x[begin:end]), target[begin:end]).sum()
        weights = [model[0].weight, model[2].weight]
        want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        torch.testing.assert_close(exact[sample], want)
    # The sketch of both layers is the sum of those of each: E over seeds is not needed to see it.
    found = projected(model, x, target, squares, offsets, 64)
    first, second = exact.split([63, 18], 1)
    want = sketch(first, 64, seed=tensor_seed(0, "0")) + sketch(second, 64, seed=tensor_seed(0, "2"))
    torch.testing.assert_close(found, want)
    parts = [projected(model, x[:5], target[:5], squares, offsets[:3], 64),
             projected(model, x[5:], target[5:], squares, offsets[2:] - 5, 64)]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), found)
    assert model[0].weight.grad is None and not x.requires_grad


def test_scores_of_a_store_are_those_of_the_whole_matrix(tmp_path):
    torch.manual_seed(0)
    phi, test = torch.randn(37, 12), torch.randn(5, 12)
    write_store(tmp_path / "phi.npy", phi.split([20, 17]), 37, 12)
    kernel = phi.double().T @ phi.double()
    kernel += 1e-3 * kernel.diagonal().mean() * torch.eye(12)
    want = test.double() @ kernel.inverse() @ phi.double().T
    found = scores(tmp_path / "phi.npy", test, block=8)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-7)  # rounded to float32 once


@pytest.mark.slow
def test_the_cpp_program_builds_against_the_cmake_target_and_agrees_with_itself(tmp_path):
    import ninja

    tool, program = [sys.executable, "-m", "cmake"], Path(ninja.BIN_DIR) / "ninja"
    configure = ["-S", str(ROOT / "examples" / "cpp"), "-B", str(tmp_path), "-G", "Ninja"]
    subprocess.run([*tool, *configure, f"-DCMAKE_MAKE_PROGRAM={program}"], check=True, capture_output=True)
    subprocess.run([*tool, "--build", str(tmp_path)], check=True, capture_output=True)
    done = subprocess.run([str(tmp_path / "ghost_norm")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("by hand") == 2, done.stdout + done.stderr
