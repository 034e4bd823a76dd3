"""`u^T H u` against differences of the loss itself, in float64 throughout; where there is no second backward pass."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from fillm.data import collate
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.unlearn.curvature import TWO_BACKWARD_PASSES, CurvatureAlong, SummedCurvature
from tests.families import build_family, build_lora
from tests.unlearn.table_model import TableModel, sample_set
from tests.unlearn.test_command_pieces import drawn_samples, plain_loss

MIXED = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]


class AllDouble(TorchFunctionMode):
    """Norms, rotations and attention go to float32 even in a float64 model, too rough to be differenced: not here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = [torch.float64 if one is torch.float32 else one for one in args]
        named = {key: torch.float64 if one is torch.float32 else one for key, one in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wide, **named)


def direction(model, names, length=0.05):
    """A random `u`, as precise as the command's."""
    draw, parameters = torch.Generator().manual_seed(5), dict(model.named_parameters())
    return {
        name: (length * torch.randn(parameters[name].shape, generator=draw, dtype=torch.float64)).to(
            torch.promote_types(parameters[name].dtype, torch.float32)
        )
        for name in names
    }


def summed_loss(model, samples, moves):
    """At weights moved by the sum of `(t, u)`, in place and back."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for _, u in moves for name in u}
    for t, u in moves:
        for name, along in u.items():
            parameters[name].data = parameters[name] + t * along
    with torch.no_grad():
        value = sum(float(plain_loss(model, sample)) for sample in samples)
    for name, weight in kept.items():
        parameters[name].data = weight
    return value


def differenced(model, samples, u, h=2e-3):
    """Second derivative along `u` by five losses: off by h^4/90 of the sixth, and by 1e-16 / h^2."""
    at = {k: summed_loss(model, samples, [(k * h, u)]) for k in range(-2, 3)}
    return (16 * (at[1] + at[-1]) - 30 * at[0] - at[2] - at[-2]) / (12 * h * h)


def curvature(model, samples, u, passes=None, tried=False, alone=""):
    """Over a set in several batches; with `tried`, in the way that suits the model, as the command does it."""
    along = CurvatureAlong.tried(model, u, [samples, samples], alone) if tried else CurvatureAlong(model, u, alone)
    statistic = SummedCurvature()
    (passes or Passes(Console.silent(), tokens_per_batch=20)).run("curvature", "pass", along, samples, statistic)
    return float(statistic.total), along


CASES = ["llama", "llama-tied", "qwen3", "gemma2", "phi", "gpt2", "gpt-neox", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("case", [*CASES, "llama-sdpa", "lora"])
def test_of_the_loss_itself(case):
    if case == "lora":
        model = build_lora("llama", ["q_proj", "down_proj"]).double()
        names = [name for name, _ in model.named_parameters() if "lora_" in name]
    else:
        model = build_family(case.removesuffix("-sdpa")).double()
        names = [name for name, _ in model.named_parameters()]
    if case.endswith("-sdpa"):
        model.set_attn_implementation("sdpa")
    samples, u = drawn_samples(3, 7), direction(model, names)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with AllDouble():
        want = differenced(model, samples, u)
        got, along = curvature(model, samples, u, tried=case in ("llama-sdpa", "lora"))
    assert along.how == TWO_BACKWARD_PASSES
    assert got == pytest.approx(want, rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert not any(value.requires_grad for value in model.parameters())


def test_a_mask_is_not_the_sum_of_its_tensors():
    model, samples = build_family("llama").double(), drawn_samples(4, 8)
    u, h = direction(model, MIXED[:2]), 1e-3
    first, second = ({name: u[name]} for name in MIXED[:2])
    with AllDouble():
        corners = [
            a * b * summed_loss(model, samples, [(a * h, first), (b * h, second)]) for a in (1, -1) for b in (1, -1)
        ]
        cross = sum(corners) / (4 * h * h)
        both, one, other = (curvature(model, samples, along)[0] for along in (u, first, second))
    assert abs(cross) > 1e-2 * abs(both)
    assert both - one - other == pytest.approx(2 * cross, rel=1e-4)


def test_of_tokens_known_by_heart():
    """`L'' = p (1 - p) a^2` of a logit that is margin + a t above the only other one; 1 - p is 2e-9 here."""
    model = TableModel(torch.tensor([[0.0, -20.0], [0.0, 0.0]]))
    u = {"head.weight": torch.tensor([[0.5, 0.0], [-0.25, 0.0]])}  # times the scales 2 * 3: a = 4.5
    found, _ = curvature(model, sample_set(([0, 0], 1)), u)
    p = 1 / (1 + torch.tensor(-20.0, dtype=torch.float64).exp())
    assert found == pytest.approx(float(p * torch.tensor(-20.0, dtype=torch.float64).exp() * p * 4.5**2), rel=1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_of_narrow_weights(dtype, rel):
    """A bfloat16 number is off by 2^-9 at most, 0.1 % in root mean square; some hundred roundings make 1 to 2 %."""
    model, samples = build_family("llama", dtype=dtype), drawn_samples(12, 9)
    u = direction(model, MIXED)
    wide = build_family("llama", dtype=dtype).double()
    with AllDouble():
        want = differenced(wide, samples, {name: along.double() for name, along in u.items()})
    assert curvature(model, samples, u)[0] == pytest.approx(want, rel=rel)


def test_what_the_loss_does_not_depend_on():
    model = TableModel(torch.eye(3, dtype=torch.float64))
    model.unused = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    samples = sample_set(([0, 1], 1), ([1, 2, 0], 1))
    for u in ({"unused.weight": torch.ones(3, 3)}, {"head.weight": torch.zeros(3, 3, dtype=torch.float64)}):
        found, along = curvature(model, samples, u, tried=True)
        assert found == 0.0 and along.how == TWO_BACKWARD_PASSES


def test_one_by_one_is_the_same():
    model, samples = build_family("llama"), drawn_samples(6, 10)
    u = direction(model, MIXED)
    together, apart = (curvature(model, samples, u, alone=alone)[0] for alone in ("", "they influence each other"))
    assert apart == pytest.approx(together, rel=1e-5)


def test_losses_are_those_of_the_pass():
    model, samples = build_family("llama"), drawn_samples(6, 11)
    passes = Passes(Console.silent())
    curvature(model, samples, direction(model, MIXED), passes)
    want = [float(plain_loss(model, sample)) for sample in samples]
    assert passes.losses["curvature"].tolist() == pytest.approx(want, rel=1e-5)


class OnceSwish(torch.autograd.Function):
    """x sigmoid(x) of which only the first derivative is there, as of a fused kernel that says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        p = x.sigmoid()
        return slope * p * (1 + x * (1 - p))


class SilentSwish(OnceSwish):
    """The same of a kernel that says nothing: what it returns is a constant to autograd."""

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        p = x.detach().sigmoid()
        return slope.detach() * p * (1 + x.detach() * (1 - p))


class Applied(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


REFUSED, NOTICED = (OnceSwish, "once_differentiable"), (SilentSwish, "two backward passes gave")


@pytest.mark.parametrize(
    ("kernel", "why", "dtype", "rel", "mode"),
    [
        (*REFUSED, torch.float64, 1e-3, AllDouble),
        (*REFUSED, torch.float32, 0.02, nullcontext),
        (*REFUSED, torch.bfloat16, 0.02, nullcontext),
        (*NOTICED, torch.float64, 1e-3, AllDouble),
        (*NOTICED, torch.float32, 0.02, nullcontext),
    ],
)
def test_without_a_second_backward_pass(kernel, why, dtype, rel, mode):
    """bfloat16 weights are differenced in float32, so they are as good as those."""
    model, samples = build_family("llama", dtype=dtype), drawn_samples(8, 12)
    u, wide = direction(model, MIXED), build_family("llama", dtype=dtype).double()
    with AllDouble():
        want = differenced(wide, samples, {name: along.double() for name, along in u.items()})
    for layer in model.model.layers:
        layer.mlp.act_fn = Applied(kernel)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with mode():
        found, along = curvature(model, samples, u, tried=True)
    assert along.how.startswith("central differences of the slope at +-") and why in along.how
    assert found == pytest.approx(want, rel=rel)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_differences_along_nothing():
    model = build_family("llama")
    model.model.layers[0].mlp.act_fn = Applied(OnceSwish)
    assert curvature(model, drawn_samples(3, 13), {MIXED[0]: torch.zeros(32, 56)}, tried=True)[0] == 0.0


def test_attention_that_is_fused():
    """It is left aside for this pass, and comes back."""
    ran = []

    def fused(module, query, key, value, attention_mask, **given):
        ran.append(None)
        return eager_attention_forward(module, query, key, value, attention_mask, **given)

    AttentionInterface.register("fused-for-a-test", fused)
    model, samples = build_family("llama"), drawn_samples(3, 14)
    u = direction(model, MIXED)
    want, _ = curvature(model, samples, u)
    model.set_attn_implementation("fused-for-a-test")
    found, along = curvature(model, samples, u, tried=True)
    assert not ran and along.how == TWO_BACKWARD_PASSES
    assert model.config._attn_implementation == "fused-for-a-test"
    assert found == pytest.approx(want, rel=1e-5)


def test_grouped_experts():
    model, samples = build_family("mixtral"), drawn_samples(5, 15)
    u = direction(model, [name for name, _ in model.named_parameters() if "experts" in name or "gate" in name])
    want, _ = curvature(model, samples, u)
    model.set_experts_implementation("grouped_mm")
    assert curvature(model, samples, u, tried=True)[0] == pytest.approx(want, rel=1e-3)


def test_batches_hold_what_they_are_given():
    """The sum over a set is the sum over its samples, whatever the layout of the batches."""
    model, samples = build_family("llama").double(), drawn_samples(5, 16)
    along = CurvatureAlong(model, direction(model, MIXED))
    seen = []
    for layout in ("right", "packed"):
        along.run(collate(samples, [3, 0, 4], layout), samples, lambda *given: seen.append(given))
    assert all(name == "" and positions.tolist() == [3, 0, 4] for name, _, positions in seen)
    values = [float(value) for _, value, _ in seen]
    assert values == pytest.approx([values[0]] * 2, rel=1e-5)
