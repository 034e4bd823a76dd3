"""Masks of models: names, laws, and the models they are refused for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fillm
from fillm.errors import UsageError
from fillm.masks import Mask, TensorMask
from fillm.models import model_fingerprint
from tests.families import build_family

SHAPES = {"a": (5, 3), "b": (9,), "c": (2, 3, 4)}


class Model(nn.Module):
    """Three parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def plain(seed: int, density: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def as_bool(mask: Mask) -> dict[str, torch.Tensor]:
    return {name: mask[name].to_bool() if name in mask else torch.zeros(SHAPES[name]).bool() for name in SHAPES}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in SHAPES)


sources = st.builds(plain, st.integers(0, 50), st.sampled_from([0.0, 0.05, 0.5, 1.0]))


@settings(max_examples=60, deadline=None)
@given(sources, sources, sources)
def test_union_intersection_and_complement_are_those_of_bool_tensors(x, y, z):
    model = Model()
    a, b, c = (Mask.from_bool(source) for source in (x, y, z))
    assert same(as_bool(a | b), {name: x[name] | y[name] for name in SHAPES})
    assert same(as_bool(a & b), {name: x[name] & y[name] for name in SHAPES})
    assert same(as_bool(a.complement(model)), {name: ~x[name] for name in SHAPES})
    assert (a | b).complement(model) == a.complement(model) & b.complement(model)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | a.complement(model) == Mask.whole(model, SHAPES) and len(a & a.complement(model)) == 0
    assert a.count == sum(int(tensor.sum()) for tensor in x.values())
    for mask in (a | b, a & b, a.complement(model)):
        assert list(mask) == sorted(mask) and all(mask[name].count for name in mask)


def test_what_a_mask_is():
    mask = fillm.Mask({"b": TensorMask((9,)), "a": TensorMask((5, 3), rows=torch.tensor([1])), "c": TensorMask((0, 2))})
    assert list(mask) == ["a", "b"] and len(mask) == 2 and mask.count == 12 and "c" not in mask
    assert repr(mask) == "Mask(12 weights of 2 tensors)" and mask.provenance == {} and mask.model_fingerprint is None
    with pytest.raises(KeyError):
        mask["c"]


@pytest.mark.parametrize("name", ["", "../evil", "a\\b", "a\nb", "a\0", 3])
def test_names_that_no_parameter_has_are_refused(name):
    with pytest.raises(UsageError, match="mask of the tensor"):
        Mask({name: TensorMask((2,))})


def test_names_are_paths_of_modules_parameters_kinds_and_globs():
    model = build_family("llama")
    mlp = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.mlp.")]
    for given_names, expected in [
        (["lm_head"], ["lm_head.weight"]),
        (["layers.1.mlp"], mlp),
        (["model.norm.weight"], ["model.norm.weight"]),
        (["norm"], ["model.norm.weight"]),  # a module comes before a kind
        (["*layers.1.mlp*", "embed_tokens"], ["model.embed_tokens.weight", *mlp]),
    ]:
        mask = Mask.from_names(model, given_names)
        assert mask.tensor_names() == sorted(expected)
        assert all(mask[name].form == "whole" for name in mask)
    kinds = Mask.from_names(model, ["attn"])
    assert len(kinds) == 8 and all("self_attn" in name for name in kinds)
    with pytest.raises(UsageError, match="lm_heat: matches no tensor"):
        Mask.from_names(model, ["lm_head", "lm_heat"])


@pytest.mark.parametrize(("family", "owner"), [("gpt2", "transformer.wte"), ("llama-tied", "model.embed_tokens")])
def test_a_tied_head_goes_by_the_name_of_its_module(family, owner):
    model = build_family(family)
    assert Mask.from_names(model, ["lm_head"]).module_names() == [owner]


def test_module_names_are_those_that_made_the_mask():
    model = build_family("llama")
    modules = ["lm_head", "model.layers.0.mlp.up_proj", "model.norm"]
    mask = Mask.from_names(model, modules)
    assert mask.module_names() == modules and Mask.from_names(model, mask.module_names()) == mask
    part = mask & Mask({"lm_head.weight": TensorMask((97, 32), rows=torch.tensor([4]))})
    for names in (part.tensor_names, part.module_names):
        with pytest.raises(UsageError, match=r"lm_head.weight: only a part is selected"):
            names()


def test_other_models_are_refused_by_the_first_tensor_that_differs():
    model, tied = build_family("llama"), build_family("llama-tied")
    mask = Mask.whole(model, ["model.norm.weight", "lm_head.weight"])
    mask.check(model)
    with pytest.raises(UsageError, match=r"lm_head.weight, which this model calls model.embed_tokens.weight: use"):
        mask.check(tied)
    with pytest.raises(UsageError, match=r"model.norm.weight, which this model does not have; it is of another"):
        Mask.whole(model, ["model.norm.weight"]).check(build_family("gpt-neox"))
    with pytest.raises(UsageError, match=r"lm_head.weight of shape \[97, 32\], here it has \[3, 32\]"):
        model.lm_head = nn.Linear(32, 3, bias=False)
        mask.check(model)
    with pytest.raises(UsageError, match=r"which this model calls transformer.wte.weight: use that name"):
        mask.complement(build_family("gpt2"))
    with pytest.raises(UsageError, match="selects from nothing.weight"):
        Mask.whole(model, ["nothing.weight"])


def test_other_weights_are_refused_where_both_fingerprints_are_known():
    one, other = build_family("llama"), build_family("llama", seed=1)
    prints = model_fingerprint(one), model_fingerprint(other)
    mask = Mask({"model.norm.weight": TensorMask((32,))}, model_fingerprint=prints[0])
    mask.check(one, prints[0])
    mask.check(other)
    Mask.whole(other, ["model.norm.weight"]).check(other, prints[1])
    shown = rf"{prints[0][:12]}\.\.\. and {prints[1][:12]}"
    with pytest.raises(UsageError, match=f"other weights .*{shown}"):
        mask.check(other, prints[1])
    with pytest.raises(UsageError, match=f"union of two masks: made for different models .*{shown}"):
        mask | Mask({"model.norm.weight": TensorMask((32,))}, model_fingerprint=prints[1])
    for both in (mask | Mask({}), Mask({}) & mask):
        assert both.model_fingerprint == prints[0]


def test_masks_of_different_shapes_do_not_combine():
    with pytest.raises(UsageError, match=r"intersection of two masks: a has the shapes \[3\] and \[4\]"):
        Mask({"a": TensorMask((3,))}) & Mask({"a": TensorMask((4,))})
    with pytest.raises(TypeError):
        Mask({}) | 3


def test_provenance_tells_how_masks_were_combined():
    model = Model()
    one = Mask({"a": TensorMask((5, 3))}, {"method": "x"})
    both = one | Mask.whole(model, ["b"])
    assert both.provenance == {"method": "union", "of": [{"method": "x"}, {"method": "names", "names": ["b"]}]}
    assert one.complement(model).provenance == {"method": "complement", "of": [{"method": "x"}]}


def test_only_bool_tensors_are_taken_for_bools():
    with pytest.raises(UsageError, match=r"mask of a: must be bool, not torch.float32"):
        Mask.from_bool({"a": torch.zeros(3)})
