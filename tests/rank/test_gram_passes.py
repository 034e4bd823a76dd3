"""Exact Gram matrices through whole passes: families, fallbacks, groups within a memory, folders that resume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, verify
from fillm.data import SampleSet
from fillm.errors import InterruptedRun, NumericsError, UsageError
from fillm.rank import gram_passes
from fillm.rank.console import Console
from fillm.rank.gram_groups import Group, Sizes, gram_groups
from fillm.rank.gram_passes import exact_grams
from fillm.rank.passes import Passes
from fillm.runs import RunFolder
from fillm.statistics import KeptGradients, TensorGram, held_tensors
from tests.capture import small_models
from tests.capture.reference import reference_gradients, toy_samples
from tests.capture.small_models import HIDDEN, VOCAB, small_model
from tests.families import build_family, build_lora

# Float32 passes give every gradient to 1e-5 of its norm (tests.capture.reference), so a product of two to twice that;
# the products themselves add 1e-6.
TOLERANCE = 2.1e-5
AMPLE = 1 << 30
FORGET, RETAIN = toy_samples(3, seed=1), toy_samples(34, seed=2)  # a norm of 32 entries is shorter than 34 samples


def passes(folder: RunFolder | None = None, **settings: Any) -> Passes:
    return Passes(Console.silent(), **{"tokens_per_batch": 64, "folder": folder, **settings})


def capture_of(model: nn.Module, names: Sequence[str] | None = None, **settings: Any) -> Capture:
    return Capture(model, names or [name for name, _ in model.named_parameters()], **settings)


Sets = tuple[SampleSet, SampleSet]


def grams_of(capture: Capture, sets: Sets = (FORGET, RETAIN), memory: int = AMPLE, **settings: Any) -> list[TensorGram]:
    return list(exact_grams(passes(**settings), capture, *sets, memory))


class Reference:
    """All gradients in float64 by batch-1 autograd."""

    def __init__(self, model: nn.Module, forget: SampleSet = FORGET, retain: SampleSet = RETAIN) -> None:
        self.f, self.g = reference_gradients(model, forget), reference_gradients(model, retain)

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """[m, P] and [n, P]."""
        return tuple(torch.stack([one[name].flatten() for one in some]) for some in (self.f, self.g))

    def check(self, grams: Sequence[TensorGram], zero: Sequence[str] = ()) -> None:
        """Every entry; tensors in `zero` have no gradient in real arithmetic."""
        for found in grams:
            f, g = self.rows(found.name)
            assert found.numel == f.shape[1]
            if found.name in zero:
                assert float(f.norm()) < 1e-6 and not any(bool(part.any()) for part in parts(found).values())
                continue
            norm_f, norm_g = f.norm(dim=1), g.norm(dim=1)
            for part, exact, sizes in (
                (found.forget, f @ f.T, norm_f.outer(norm_f)),
                (found.cross, g @ f.T, norm_g.outer(norm_f)),
                (found.retain, g @ g.T, norm_g.outer(norm_g)),
            ):
                assert part.dtype == torch.float64 and part.shape == exact.shape
                assert bool(((part - exact).abs() <= TOLERANCE * sizes).all()), found.name
            assert (found.retain_rows is not None) == (found.numel <= len(g)) == (found.forget_rows is not None)
            if found.retain_rows is not None:
                for part, exact in ((found.forget_rows, f), (found.retain_rows, g)):
                    assert bool(((part - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()), found.name


def parts(found: TensorGram) -> dict[str, Tensor]:
    every = {name: getattr(found, name) for name in ("forget", "cross", "retain", "retain_rows", "forget_rows")}
    return {name: value for name, value in every.items() if value is not None}


def same_bits(some: Sequence[TensorGram], others: Sequence[TensorGram]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one.name, one.numel, parts(one).keys()) == (other.name, other.numel, parts(other).keys())
        assert all(torch.equal(value, parts(other)[name]) for name, value in parts(one).items()), one.name


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "opt"])
def test_every_tensor_of_a_family(family: str) -> None:
    model = build_family(family)
    capture = capture_of(model)
    verify(capture, RETAIN)
    grams = grams_of(capture)
    assert [found.name for found in grams] == list(capture.parameters)
    assert any(found.retain_rows is not None for found in grams)
    # No rotary positions: a key's bias shifts all scores of a query alike.
    zero = [name for name in capture.parameters if family == "opt" and name.endswith("k_proj.bias")]
    Reference(model).check(grams, zero)


def test_adapters() -> None:
    model = build_lora("llama", ["q_proj", "v_proj", "down_proj"])
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    capture = capture_of(model, names)
    grams = grams_of(capture)
    assert [found.name for found in grams] == names
    Reference(model).check(grams)


SHORT = toy_samples(3, VOCAB, seed=1), toy_samples(9, VOCAB, seed=2)


@pytest.mark.parametrize("body", [small_models.Einsum, small_models.OuterAndDense, small_models.Attention])
def test_tensors_without_a_cheap_form(body: type[nn.Module]) -> None:
    model = small_model(body())
    capture = capture_of(model)
    verify(capture, SHORT[1])
    Reference(model, *SHORT).check(grams_of(capture, SHORT))


def test_operation_without_a_rule_is_met_on_the_way_and_remembered() -> None:
    model = small_model(small_models.Einsum())
    capture = capture_of(model)
    grams = grams_of(capture, SHORT)
    assert capture.fallback == {"body.weight": "no rule for einsum"}
    Reference(model, *SHORT).check(grams)


def test_operation_that_the_estimate_did_not_meet_is_remembered_too() -> None:
    capture = capture_of(small_model(small_models.Einsum()))
    sets = dict(zip(("forget", "retain"), SHORT, strict=True))
    gram_passes._group(passes(), capture, Group(("body.weight",), frozenset()), sets, "gram-1", "")
    assert capture.fallback == {"body.weight": "no rule for einsum"}


def test_batches_of_one() -> None:
    model = build_family("llama")
    Reference(model, *SHORT).check(grams_of(capture_of(model, alone="samples influence each other"), SHORT))


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_layouts(layout: str) -> None:
    model = build_family("llama")
    Reference(model, *SHORT).check(grams_of(capture_of(model), SHORT, layout=layout))


def test_samples_of_which_a_tensor_knows_only_noise_have_no_gradient() -> None:
    model = build_family("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    reference = Reference(model, *SHORT)
    norms = reference.rows(name)[1].norm(dim=1)
    floor = float(norms.sort().values[4:6].mean())  # between the fifth and the sixth of nine
    (found,) = grams_of(capture_of(model, [name], noise={name: floor}), SHORT)
    loud = norms > floor
    assert int(loud.sum()) == 4
    for one in reference.g:
        one[name] = torch.where(one[name].norm() > floor, one[name], 0.0)
    for one in reference.f:
        one[name] = torch.where(one[name].norm() > floor, one[name], 0.0)
    reference.check([found])
    assert not found.retain[~loud].any() and not found.cross[~loud].any()


def test_tensors_that_no_gradient_reaches_are_zero() -> None:
    model = small_model(small_models.Unused())
    capture = capture_of(model)
    unused = ["body.idle", "body.cut", "body.frozen"]
    Reference(model, *SHORT).check(grams_of(capture, SHORT), zero=unused)


class RootOfZero(nn.Module):
    """A finite loss with infinite gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return (h * self.scale).square().sqrt()


def test_gradient_that_is_not_finite_is_named() -> None:
    model = small_model(RootOfZero())
    model.body.scale.data.zero_()
    with pytest.raises(NumericsError, match=r"^the gradient of sample toy#0 with respect to body.scale is not finite$"):
        grams_of(capture_of(model, ["body.scale"]), SHORT)


class Held(KeptGradients):
    """Notes how many bytes the gradients of both sets take at most."""

    alive: list["Held"]
    most: int

    def __init__(self, formed: frozenset[str]) -> None:
        super().__init__(formed)
        Held.alive = [*Held.alive[-1:], self]

    def observe(self, name: str, gradients: Any, positions: Tensor) -> None:
        super().observe(name, gradients, positions)
        storages = {}
        for one in Held.alive:
            for kept in one.kept.values():
                for gradients, _ in kept:
                    for tensor in held_tensors(gradients):
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        Held.most = max(Held.most, sum(storages.values()))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_groups_stay_within_the_memory_and_make_no_difference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family(family)
    names = [name for name, _ in model.named_parameters() if "layers.1" not in name]
    whole = grams_of(capture_of(model, names), SHORT)
    monkeypatch.setattr(gram_passes, "KeptGradients", Held)
    groups = []
    for memory in (110_000, 200_000, 10_000_000):
        Held.alive, Held.most = [], 0
        run = passes()
        same_bits(list(exact_grams(run, capture_of(model, names), *SHORT, memory)), whole)
        groups.append(len(run.record) // 2)
        # Which experts a token takes, and how many of a sample's tokens are answers, differs from the probe: 10 %.
        assert Held.most <= 1.1 * memory
    assert groups[0] > groups[1] > groups[2] == 1
    assert set(run.losses) >= {"forget", "retain"} and bool((run.losses["retain"] > 0).all())


def test_every_tensor_in_a_group_of_its_own() -> None:
    model = build_family("llama")
    names = [name for name, _ in model.named_parameters() if "layers.0" in name]
    one_by_one = [grams_of(capture_of(model, [name]), SHORT)[0] for name in names]
    same_bits(one_by_one, grams_of(capture_of(model, names), SHORT))


def test_tensors_with_the_same_input_share_it() -> None:
    model = build_family("llama")
    names = [f"model.layers.0.self_attn.{which}_proj.weight" for which in "qkv"]
    run, sets = passes(), list(SHORT)
    tokens = Sizes.of(run, capture_of(model), sets).tokens
    together = 4 * tokens * (32 + 32 + 16 + 16)  # x once; dy of q, k and v
    # One sample is scaled up to all, so that a byte or so may be lost to rounding for each of four tensors.
    assert len(gram_groups(run, capture_of(model), names, sets, together + 4)) == 1
    assert len(gram_groups(run, capture_of(model), names, sets, together - 8)) == 2


def test_of_the_head_only_tokens_with_an_answer_are_counted() -> None:
    model, name = build_family("llama"), "lm_head.weight"
    answers = sum(label != -100 for samples in SHORT for sample in samples for label in sample.labels)
    exact = 4 * answers * (32 + 97)
    assert len(gram_groups(passes(), capture_of(model), [name], list(SHORT), exact + 4)) == 1
    with pytest.raises(UsageError, match="lm_head"):
        gram_groups(passes(), capture_of(model), [name], list(SHORT), exact - 8)


def test_long_samples_of_small_tensors_are_kept_entry_by_entry() -> None:
    model = build_lora("llama", ["q_proj"], rank=2)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    long = toy_samples(3, seed=1, shortest=60, longest=80), toy_samples(4, seed=2, shortest=60, longest=80)
    (group,) = gram_groups(passes(), capture_of(model, names), names, long, AMPLE)
    assert group.formed == set(names)  # 64 entries, against 60 tokens of 34
    Reference(model, *long).check(grams_of(capture_of(model, names), long))


def test_sizes_are_those_of_the_batches() -> None:
    model, sets = build_family("llama"), [toy_samples(5, seed=1)]
    lengths = [len(sample.input_ids) for sample in sets[0]]
    answers = sum(label != -100 for sample in sets[0] for label in sample.labels)
    exact = Sizes(5, sum(lengths), answers)
    assert Sizes.of(passes(layout="packed"), capture_of(model), sets) == exact
    assert Sizes.of(passes(), capture_of(model, alone="yes"), sets) == exact
    assert Sizes.of(passes(tokens_per_batch=1000), capture_of(model), sets).tokens == 5 * max(lengths)


def test_memory_that_one_tensor_exceeds() -> None:
    model = build_family("llama")
    run = passes()
    with pytest.raises(UsageError) as caught:
        list(exact_grams(run, capture_of(model), *SHORT, 1000))
    message = str(caught.value)
    assert message.startswith("--memory 1000 B: the gradients of ") and "\n" not in message
    assert message.endswith("give --memory 1MiB or more, fewer samples, or --exclude model.embed_tokens.weight") or (
        "of all 12 samples take" in message and "give --memory 1MiB or more" in message
    )
    assert run.record == []  # before any pass


class Stopped(Passes):
    """Interrupted in the n-th pass."""

    left: int

    def run(self, *given: Any, **settings: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedRun("stopped")
        super().run(*given, **settings)


def folder_at(path: Path, resume: bool) -> RunFolder:
    return RunFolder(path / "out", overwrite=False, resume=resume)


@pytest.mark.parametrize("pace", [0.0, 1e9])
def test_finished_groups_are_not_computed_again(tmp_path: Path, pace: float) -> None:
    model = build_family("llama")
    whole = grams_of(capture_of(model), SHORT)
    memory = 60_000
    with folder_at(tmp_path, resume=False) as folder:
        run = Stopped(Console.silent(), tokens_per_batch=64, folder=folder, checkpoint_seconds=pace)
        run.left = 5  # in the third group's second pass
        with pytest.raises(InterruptedRun):
            list(exact_grams(run, capture_of(model), *SHORT, memory))
        assert folder.load_state() is None
        stages = len(list(folder.partial.glob("stage-grams-*.json")))
    assert stages == (2 if pace == 0.0 else 1)  # at its pace, or what there is when it is stopped
    with folder_at(tmp_path, resume=True) as folder:
        run = passes(folder, checkpoint_seconds=1e9)
        same_bits(list(exact_grams(run, capture_of(model), *SHORT, memory)), whole)
        total = len(run.record) // 2
        assert set(run.losses) >= {"forget", "retain"}
    assert total == len(gram_groups(passes(), capture_of(model), list(capture_of(model).parameters), SHORT, memory)) - 2


def test_a_later_pass_keeps_its_state(tmp_path: Path) -> None:
    """Groups that were too quick to be saved are computed again on the way to it, and must not be saved then."""
    model = build_family("llama")
    with folder_at(tmp_path, resume=False) as folder:
        folder.save_state("damage", 3, {"a": torch.ones(2)}, {})
        run = passes(folder, checkpoint_seconds=0.0)
        list(exact_grams(run, capture_of(model), *SHORT, 60_000))
        found = folder.load_state()
        assert found is not None and found[:2] == ("damage", 3)
        assert not list(folder.partial.glob("stage-*"))


def test_what_was_learned_about_a_tensor_is_kept_with_it(tmp_path: Path) -> None:
    model = small_model(small_models.Einsum())
    with folder_at(tmp_path, resume=False) as folder:
        first = list(exact_grams(passes(folder, checkpoint_seconds=0.0), capture_of(model), *SHORT, AMPLE))
    with folder_at(tmp_path, resume=True) as folder:
        capture, run = capture_of(model), passes(folder)
        same_bits(list(exact_grams(run, capture, *SHORT, AMPLE)), first)
        assert run.record == [] and capture.fallback == {"body.weight": "no rule for einsum"}
