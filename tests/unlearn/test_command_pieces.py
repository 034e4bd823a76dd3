"""The parts of a run by themselves: which samples a step sees, when it stops, the gradient, the prediction."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fillm
from fillm.data import Sample, SampleSet
from fillm.errors import UsageError
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.runs.processes import Processes
from fillm.unlearn.config import UnlearnConfig, resolved
from fillm.unlearn.gradients import StepGradients
from fillm.unlearn.influence import masked_update, predicted
from fillm.unlearn.losses import LossOptions, make_loss
from fillm.unlearn.plan import plan_of
from fillm.unlearn.sampling import StepSamples, steps_per_epoch
from fillm.unlearn.sources import Sources
from fillm.unlearn.stopping import Evaluation, StoppingRule
from tests.families import VOCAB_SIZE, build_family

NAMES = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]


def drawn_samples(count, seed):
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        length = int(torch.randint(3, 9, (), generator=draw))
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=draw).tolist()
        prompt = int(torch.randint(1, length, (), generator=draw))
        samples.append(Sample(f"{seed}#{number}", tuple(ids), tuple([-100] * prompt + ids[prompt:])))
    return SampleSet(samples, f"set {seed}")


def plain_loss(model, sample):
    """Mean over the answer tokens, in plain torch, one sample."""
    logits = model(torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
    picked = [-logits[t - 1, label] for t, label in enumerate(sample.labels) if label != -100]
    return sum(picked) / len(picked)


def test_the_warm_up_is_shorter_than_the_run():
    plan = plan_of(resolved(UnlearnConfig(epochs=2, batch_size=4, warmup=3), given=True), num_forget=7)
    assert (plan.steps, plan.warmup) == (4, 3)
    assert plan_of(resolved(UnlearnConfig(max_steps=10, warmup=0.25), given=True), num_forget=7).warmup == 2
    assert plan_of(resolved(UnlearnConfig(max_steps=1, warmup=0.9), given=True), num_forget=7).warmup == 0
    for warmup, steps in ((4, {"epochs": 2}), (3, {"max_steps": 3}), (99.6, {"max_steps": 100})):
        with pytest.raises(UsageError, match=f"--warmup {warmup}: the run has no more than"):
            plan_of(resolved(UnlearnConfig(batch_size=4, warmup=warmup, **steps), given=True), num_forget=7)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_sees_every_forget_sample_once(count, per_step, seed, epoch):
    lengths = [1 + (7 * number) % 11 for number in range(count)]
    steps = steps_per_epoch(count, per_step)
    order = StepSamples(lengths, 1, per_step, seed)
    seen = [order.forget(epoch * steps + step) for step in range(steps)]
    assert StepSamples(lengths, 1, per_step, seed).forget(epoch * steps) == seen[0]
    assert sorted(position for batch in seen for position in batch) == list(range(count))
    assert max(map(len, seen)) <= per_step


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_retain_samples_come_in_turn(count, per_step, seed):
    order = StepSamples([1], count, per_step, seed)
    row = [at for step in range(2 * count) for at in order.retain(step)]
    assert len(row) == 2 * count * per_step
    for begin in range(0, len(row) - count + 1, count):
        assert sorted(row[begin : begin + count]) == list(range(count))


def test_retain_order_depends_on_the_seed():
    orders = [StepSamples([1], 50, 50, seed).retain(0) for seed in (0, 1)]
    assert orders[0] != orders[1] != list(range(50)) != orders[0]


CURVE = [Evaluation(0, 0.1, 0.1), Evaluation(2, 1.0, 0.3), Evaluation(4, 2.0, 0.2), Evaluation(6, 3.0, 0.9)]


@pytest.mark.parametrize(
    ("target", "bound", "kept"),
    [(None, None, 6), (None, 0.3, 4), (None, 0.25, 4), (None, 0.05, 6), (0.5, None, 4), (2.5, 0.5, 4), (9.0, None, 6)],
)
def test_what_is_kept(target, bound, kept):
    assert StoppingRule(target, bound).best(CURVE).step == kept


@pytest.mark.parametrize(
    ("target", "bound", "step"), [(None, None, None), (2.0, None, 4), (2.0, 0.25, 2), (None, 0.1, 2), (0.1, None, 0)]
)
def test_when_it_stops(target, bound, step):
    rule = StoppingRule(target, bound)
    assert next((one.step for one in CURVE if rule.reason(one)), None) == step


def test_a_loss_that_is_not_a_number_is_too_much_lost():
    rule = StoppingRule(None, 0.5)
    assert rule.reason(Evaluation(1, math.nan, math.nan))
    assert rule.best([CURVE[0], Evaluation(1, math.nan, math.nan)]) == CURVE[0]
    assert StoppingRule(5.0, None).best([CURVE[0], Evaluation(1, math.nan, 0.0)]) == CURVE[0]


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient(micro_batch, per_sample):
    model = build_family("llama").double().eval().requires_grad_(False)
    parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in NAMES}
    forget, retain = drawn_samples(5, 1), drawn_samples(7, 2)
    loss = make_loss("grad-diff", LossOptions(gamma=0.7, alpha=1.3))
    at, kept = [4, 0, 2], [6, 1, 3, 5]
    reaches = [frozenset(NAMES[: 1 + number % 3]) for number in range(5)] if per_sample else None
    forming = StepGradients(model, loss, Sources(forget, retain), Processes("cpu"), micro_batch, None, reaches)
    sums = forming.form(at, kept, 1, lambda line: pytest.fail(line))
    found = {name: p.grad.clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    values = {position: plain_loss(model, forget[position]) for position in at}
    retained = [plain_loss(model, retain[position]) for position in kept]
    assert sums == pytest.approx((-sum(v.item() for v in values.values()), sum(v.item() for v in retained)), rel=1e-6)
    for name, parameter in parameters.items():
        want = torch.zeros_like(parameter)
        for position, value in values.items():
            if reaches is None or name in reaches[position]:
                want -= 0.7 / 3 * torch.autograd.grad(value, parameter, retain_graph=True)[0]
        for value in retained:
            want += 1.3 / 4 * torch.autograd.grad(value, parameter, retain_graph=True)[0]
        # Llama's norms are float32 even in a float64 model.
        assert float((found[name] - want).norm()) < 1e-5 * float(want.norm())


@pytest.mark.parametrize(("micro_batch", "passes"), [(8, [[4, 0, 2], [3, 1], [5]]), (2, [[4, 0], [2], [3, 1], [5]])])
def test_samples_of_one_mask_share_forward_passes(micro_batch, passes, monkeypatch):
    forget, retain, loss = drawn_samples(6, 1), drawn_samples(2, 2), make_loss("ga", LossOptions(gamma=0.7))
    reaches = [frozenset(NAMES[: 1 + number % 2]) for number in range(5)] + [frozenset(NAMES[1:])]
    seen, real = [], Sources.forget_values

    def noted(self, loss, model, positions, device):
        seen.append(list(positions))
        return real(self, loss, model, positions, device)

    monkeypatch.setattr(Sources, "forget_values", noted)
    model = build_family("llama").eval().requires_grad_(False)
    parameters = {name: p.requires_grad_(True) for name, p in model.named_parameters() if name in NAMES}
    sources = Sources(forget, retain)
    forming = StepGradients(model, loss, sources, Processes("cpu"), micro_batch, None, reaches)
    of_forget, _ = forming.form([4, 3, 0, 5, 2, 1], [], 1, lambda line: pytest.fail(line))
    assert seen == passes
    assert all(p.requires_grad for p in parameters.values())
    found = {name: p.grad.clone() for name, p in parameters.items()}
    values = [plain_loss(model, sample) for sample in forget]
    assert of_forget == pytest.approx(-sum(v.item() for v in values), rel=1e-6)
    for name, parameter in parameters.items():
        want = torch.zeros_like(parameter)
        for value, names in zip(values, reaches, strict=True):
            if name in names:
                want -= 0.7 / 6 * torch.autograd.grad(value, parameter, retain_graph=True)[0]
        assert float((found[name] - want).norm()) < 1e-5 * float(want.norm())


def test_prediction_counts_cross_tensor_terms():
    model = build_family("llama").double().eval().requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if name in NAMES}
    forget, retain = drawn_samples(4, 3), drawn_samples(6, 4)
    chosen = {name: torch.rand(p.shape) < 0.5 for name, p in parameters.items()}
    updates = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for p in parameters.values():  # a direction that learns: along minus the mean forget gradient
        p.requires_grad_(True)
    grads = {}
    for which, samples in (("forget", forget), ("retain", retain)):
        grads[which] = [torch.autograd.grad(plain_loss(model, one), list(parameters.values())) for one in samples]
    for p in parameters.values():
        p.requires_grad_(False)
    for place, name in enumerate(parameters):
        updates[name] -= 30 * sum(g[place] for g in grads["forget"])
    update = masked_update(model, fillm.Mask.from_bool(chosen), updates)
    before = {name: value.clone() for name, value in updates.items()}
    found = predicted(model, update, forget, retain, None, Passes(Console.silent()))
    assert all(torch.equal(before[name], updates[name]) for name in before)
    dots = {
        which: torch.stack(
            [
                sum((g * updates[n] * chosen[n]).sum() for g, n in zip(gradient, parameters, strict=True))
                for gradient in all_of
            ]
        )
        for which, all_of in grads.items()
    }
    gain = -float(dots["forget"].mean())
    assert gain > 0
    assert found.forget.slope == pytest.approx(gain, rel=1e-6)
    assert found.forget.predicted(found.eta) == pytest.approx(0.01)
    s = dots["retain"]
    assert found.retain.slope == pytest.approx(-float(s.mean()), rel=1e-6)
    assert found.retain.fisher == pytest.approx(float(s.square().mean()), rel=1e-6)
    want = -found.eta * float(s.mean()) + found.eta**2 / 2 * float(s.square().mean())
    assert found.retain.by_fisher(found.eta) == pytest.approx(want, rel=1e-6)
    twice = predicted(model, update, forget, retain, 2 * found.eta, Passes(Console.silent()))
    assert twice.eta == 2 * found.eta and twice.forget == found.forget and twice.retain == found.retain
