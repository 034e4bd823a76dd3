import dataclasses
import io
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fillm.capture import sample_losses
from fillm.data import Sample, SampleSet, collate, plan_batches
from fillm.errors import ModelError, UsageError
from fillm.models import catalogue
from fillm.rank.activations import saved_activation_bytes
from fillm.rank.config import RankConfig
from fillm.rank.console import Console
from fillm.rank.costs import accumulator_bytes, batch_shapes, estimated_activation_bytes
from fillm.rank.machine import measured_bandwidth, measured_rate
from fillm.rank.plan import plan, plan_run
from fillm.rank.plan_lines import Rates
from fillm.statistics import EXPANSION_NUMEL, EXPANSION_TERMS
from tests.families import FAMILIES, build_family, build_lora

CONFIG = RankConfig(model="m", tokens_per_batch=48)
RATES = Rates(1.0)


def sample_set(lengths, prompt=3, vocabulary=90):
    samples = []
    for i, length in enumerate(lengths):
        ids = tuple((7 * i + 3 * t) % vocabulary + 3 for t in range(length))
        samples.append(Sample(f"s{i}", ids, tuple([-100] * prompt + list(ids[prompt:]))))
    return SampleSet(samples, "test")


SETS = {"forget": sample_set([9, 14, 11]), "retain": sample_set([12, 7, 16, 10, 8])}


def with_attention(model, implementation):
    model.set_attn_implementation(implementation)
    return model


def counted_flop(model, samples, config):
    """FLOP of forward and backward of the activations, counted by torch while the batches run."""
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        for members in plan_batches([s.num_tokens for s in samples], config.tokens_per_batch):
            sample_losses(model, collate(samples, members)).sum().backward()
    hook.remove()
    return counter.get_total_flops()


def kept_bytes(model, rows, tokens):
    """Bytes that a real forward pass keeps, every storage once, parameters left out."""
    model.requires_grad_(True)
    own, kept = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 90 + 3
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, use_cache=False)
    assert output.logits.requires_grad
    model.requires_grad_(False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3", "phi3", "mixtral"])
def test_flop_are_those_that_torch_counts(family):
    model = with_attention(build_family(family), "eager")
    planned = plan(model, catalogue(model), SETS, CONFIG, rates=RATES)
    for one, which in zip(planned.passes, ("forget", "retain"), strict=True):
        passes = ("forward", "backward of activations", "attention, forward and backward")
        expected = counted_flop(model, SETS[which], CONFIG)
        # A mixture's router also multiplies and reduces where torch counts nothing. transformers 5.17 forms the angles
        # of rotary positions by a product (3e-5 of these passes), later ones do not. All else is exact: a layer's
        # product that is left out shows, at 1e-3 and more.
        assert sum(one.flop[name] for name in passes) == pytest.approx(expected, rel=5e-5)


def test_passes_along_the_step_and_forward_alone():
    model = build_family("llama")
    config = dataclasses.replace(CONFIG, method="path", path_points=3)
    planned = plan(model, catalogue(model), SETS, config, rates=RATES)
    forget, retain, search, *along, end = planned.passes
    saliency = plan(model, catalogue(model), SETS, dataclasses.replace(CONFIG, method="saliency"), rates=RATES)
    assert forget.flop == saliency.passes[0].flop
    assert along[0].flop == {name: 3 * value for name, value in forget.flop.items()}
    assert [one.samples for one in planned.passes] == [3, 5, 18 * 3, 3 * 3, 3 * 5, 5]
    assert [one.batches for one in (search, along[0])] == [18 * forget.batches, 3 * forget.batches]
    third = forget.flop["attention, forward and backward"] / 3
    assert search.flop == {"forward": 18 * forget.flop["forward"], "attention, forward": pytest.approx(18 * third)}
    assert retain.flop == end.flop and set(end.flop) == {"forward", "attention, forward"}
    weights = sum(info.numel for info in catalogue(model))
    kept = [value for name, value in planned.memory.items() if name.endswith(("weights", "they came", "step"))]
    assert kept == [4 * weights, 4 * weights, 4 * weights, weights]
    rounds = plan(model, catalogue(model), SETS, dataclasses.replace(config, path_rounds=5), rates=RATES)
    assert rounds.passes[0] == forget and [one.samples for one in rounds.passes[2:]] == [5 * 54, 45, 75, 25]
    assert rounds.memory["scores of what is left out, and its round"] == 5 * weights


def test_products_and_ghost_norms_by_hand():
    model = build_family("llama")
    scope = [info for info in catalogue(model) if info.name.endswith("layers.0.mlp.up_proj.weight")]
    sets = {"forget": sample_set([6, 6]), "retain": sample_set([6, 4, 44], prompt=2)}
    planned = plan(model, scope, sets, CONFIG, rates=RATES)
    weights, inputs, outputs = 56 * 32, 32, 56
    forget, retain = planned.passes
    assert forget.flop["products with weights in scope"] == 2 * weights * 12 and "ghost norms" not in forget.flop
    # Batches of the retain set: the sample of 44 alone, then 6 and 4 padded to 6. Two products: (5) and (6).
    assert (retain.samples, retain.tokens, retain.batches) == (3, 54, 2)
    assert retain.flop["products with weights in scope"] == 2 * 2 * weights * (44 + 12)
    gram = (6 * 6 + 4 * 4) * (inputs + outputs)
    explicit = 2 * 44 * inputs * outputs
    assert explicit < 44 * 44 * (inputs + outputs)
    assert retain.flop["ghost norms"] == gram + explicit


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_the_head_sees_the_answers_only(layout):
    shape = batch_shapes(sample_set([10, 8], prompt=4), 64, layout)[0]
    assert (shape.rows, shape.width) == ((1, 18) if layout == "packed" else (2, 10))
    assert shape.lengths == (10, 8) and shape.answers == (6, 4) and shape.answered == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_a_real_pass_keeps(family):
    model = with_attention(build_family(family), "eager")
    expected = kept_bytes(model, 3, 20)
    # A fused mixture's own loop keeps some copies of its routed rows more or fewer.
    tolerance = 0.1 if family in ("mixtral", "qwen3-moe") else 0.0
    assert saved_activation_bytes(model, 3, 20) == pytest.approx(expected, rel=tolerance)
    assert saved_activation_bytes(model.to("meta"), 3, 20) == pytest.approx(expected, rel=tolerance)


def test_activations_with_fused_attention_and_low_precision():
    model = with_attention(build_family("llama"), "sdpa")
    assert saved_activation_bytes(model, 4, 32) == pytest.approx(kept_bytes(model, 4, 32), rel=0.15)
    half = with_attention(build_family("llama", dtype=torch.bfloat16), "eager")
    assert saved_activation_bytes(half, 3, 20) == kept_bytes(half, 3, 20)


def test_activations_of_an_adapter():
    model = with_attention(build_lora("llama", ["q_proj", "up_proj"]), "eager")
    assert saved_activation_bytes(model, 3, 20) == pytest.approx(kept_bytes(model, 3, 20), rel=0.02)


def test_counting_activations_leaves_the_model_alone():
    model = build_family("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    saved_activation_bytes(model, 2, 8)
    assert model.config.pad_token_id == 0 and not any(p.requires_grad for p in model.parameters())
    assert all(p.device.type == "cpu" and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_that_looks_at_values_is_estimated_from_shapes():
    model = build_family("llama")
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) if x.sum().item() < 1e9 else x
    assert saved_activation_bytes(model, 2, 8) is None
    planned = plan(model, catalogue(model), SETS, CONFIG, rates=RATES)
    assert (
        "what a batch keeps for its backward pass is estimated from shapes: the model needs its values" in planned.notes
    )
    assert 0.3 < estimated_activation_bytes(model, catalogue(model), 3, 20) / kept_bytes(model, 3, 20) < 3.0


def test_memory_line_by_line():
    model = build_family("llama")
    infos = catalogue(model)
    planned = plan(model, infos, SETS, CONFIG, rates=RATES, program_bytes=1000)
    numel = sum(p.numel() for p in model.parameters())
    memory = dict(planned.memory)
    assert memory["weights"] == memory["mean forget gradient v"] == 4 * numel
    assert memory["weighted sums"] == 4 * (1 + EXPANSION_TERMS) * numel  # so small a model carries all terms
    assert memory["two scalars a sample and tensor"] == 16 * 5 * len(infos)
    assert memory["program"] == 1000 and planned.peak_bytes == sum(memory.values())
    # Of the batches of 48 tokens, the one with most answer tokens.
    rows = max(shape.answered for which in SETS for shape in batch_shapes(SETS[which], 48, "right"))
    assert memory[f"logits ({rows} rows x 97, 3 copies)"] == 4 * 3 * rows * 97
    assert memory["activations"] == max(saved_activation_bytes(model, 3, 16), saved_activation_bytes(model, 3, 14))
    on_gpu = plan(model, infos, SETS, CONFIG, rates=RATES, device_type="cuda").memory
    assert "allocator slack" in memory and "allocator slack" not in on_gpu


def test_large_tensors_have_one_weighted_sum():
    infos = [
        dataclasses.replace(catalogue(build_family("llama"))[0], shape=(n,), numel=n)
        for n in (EXPANSION_NUMEL, EXPANSION_NUMEL + 1)
    ]
    assert accumulator_bytes(infos, 4, expanded=True) == 4 * ((2 + EXPANSION_TERMS) * EXPANSION_NUMEL + 1)
    assert accumulator_bytes(infos, 8) == 8 * (2 * EXPANSION_NUMEL + 1)


@pytest.mark.parametrize(
    ("changes", "passes", "lines"),
    [
        ({}, ["forget pass", "retain pass"], ["weighted sums"]),
        ({"objective": "retain"}, ["forget pass", "retain pass", "damage pass"], ["weighted sums"]),
        ({"method": "saliency"}, ["forget pass"], []),
        ({"method": "wagle"}, ["forget pass", "retain pass"], ["mean retain gradient"]),
        ({"method": "so-influence-sum"}, ["forget pass", "retain pass"], ["mean retain gradient", "update u"]),
        (
            {"method": "path", "granularity": "element", "path_points": 3},
            [
                "forget pass",
                "retain pass, forward",
                "search of the length, 18 x forward",
                "forget passes along the step, 3 x",
                "retain passes along the step, 3 x",
                "retain pass at the end of the step, forward",
            ],
            ["contributions of the weights", "weights as they came", "signs of the step"],
        ),
        ({"method": "random"}, [], []),
        ({"method": "parameter-shift"}, [], ["weights of the base model"]),
        (
            {"compression": "sjlt"},
            ["forget pass", "retain pass"],
            ["mean forget gradient v", "sketches of the forget set", "sketches of the retain set"],
        ),
        (
            {"compression": "factored", "method": "first-order", "store": "s"},
            ["forget pass", "retain pass"],
            ["sketches of the forget set", "a block of the store"],
        ),
        (
            {"curvature": "woodbury", "save_update": True},
            ["forget pass", "retain pass", "forget pass for v", "update pass", "Gram matrices"],
            ["gradients kept, a group of tensors at a time"],
        ),
    ],
)
def test_passes_and_accumulators_of_the_methods(changes, passes, lines):
    model = build_family("llama")
    planned = plan(model, catalogue(model), SETS, dataclasses.replace(CONFIG, **changes), rates=RATES)
    assert [one.name for one in planned.passes] == passes
    assert set(lines) <= set(planned.memory)
    told = {"weighted sums", "mean retain gradient", "update u", "weights of the base model"}
    told |= {"sketches of the retain set", "a block of the store", "gradients kept, a group of tensors at a time"}
    assert told & set(planned.memory) <= set(lines)
    assert (planned.seconds > 0) == bool(passes)


def test_sketches_and_gram_matrices_by_hand():
    model = build_family("llama")
    infos = [info for info in catalogue(model) if info.name == "model.layers.0.self_attn.q_proj.weight"]
    (outputs, inputs), numel = infos[0].shape, infos[0].numel
    sketched = dataclasses.replace(CONFIG, compression="sjlt", sketch_dim=100, sketch_dtype="bfloat16")
    memory = plan(model, infos, SETS, sketched, rates=RATES).memory
    assert memory["sketches of the forget set"] == 3 * 100 * 4
    assert memory["sketches of the retain set"] == 5 * 100 * 2
    assert (
        plan(model, infos, SETS, dataclasses.replace(sketched, sketch_dim=numel), rates=RATES).memory[
            "sketches of the retain set"
        ]
        == 5 * numel * 2
    )
    exact = plan(model, infos, SETS, dataclasses.replace(CONFIG, curvature="woodbury"), rates=RATES)
    tokens = sum(
        len(members) * max(samples.lengths[i] for i in members)
        for samples in SETS.values()
        for members in plan_batches(samples.lengths, CONFIG.tokens_per_batch)
    )
    kept = 4 * min(tokens * (inputs + outputs), 8 * numel)
    assert exact.memory["gradients kept, a group of tensors at a time"] == kept
    formed = 2 * tokens * numel + 2 * 8**2 * numel
    assert exact.flop["Gram matrices"] == min(2 * tokens**2 * (inputs + outputs), formed)


def test_gradient_checkpointing_takes_less():
    model = build_family("llama")
    full = plan(model, catalogue(model), SETS, CONFIG, rates=RATES).memory["activations"]
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True)
    assert plan(model, catalogue(model), SETS, config, rates=RATES).memory["activations"] < 0.8 * full


def test_gradient_checkpointing_computes_the_layers_twice():
    model = build_family("llama")
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True)
    once, twice = (plan(model, catalogue(model), SETS, c, rates=RATES).flop for c in (CONFIG, config))
    again = twice.pop("forward of the layers, again")
    assert twice == once
    assert 0 < again < once["forward"] + once["attention, forward and backward"]


def test_time_is_flop_over_rate_and_the_lines_say_it_all():
    model = build_family("llama").to("meta")
    planned = plan(model, catalogue(model), SETS, CONFIG, rates=Rates(2e6, measured=["bandwidth"]))
    assert planned.seconds == pytest.approx(sum(planned.flop.values()) / 2e6, rel=1e-12)
    lines = planned.lines()
    shown = "\n".join(lines)
    for text in ("tensors in scope", "3 samples, 34 tokens", "expected peak", "ghost norms", "at 0.0 GFLOP/s"):
        assert text in shown
    # Every figure begins in the same column, two spaces after the longest name.
    column = 2 + max(len(name) for name in (*planned.memory, *planned.flop)) + 2
    for line in lines:
        if not line.startswith(("note: ", "memory", "work")):
            assert line[column - 2 : column] == "  " and line[column] != " "


def test_the_measured_rate_is_that_of_a_product():
    rate = measured_rate(torch.device("cpu"), seconds=0.0)
    assert 1e7 < rate < 1e15
    assert 1e7 < measured_bandwidth(torch.device("cpu"), seconds=0.0) < 1e15


def test_a_dry_run_reads_only_the_configuration(tmp_path):
    build_family("llama").config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    out, err = io.StringIO(), io.StringIO()
    config = dataclasses.replace(CONFIG, model=str(tmp_path), include="mlp", device="cpu")
    planned = plan_run(config, SETS, Console(out, err))
    assert planned.tensors == 6 and planned.parameters == 6 * 32 * 56
    assert out.getvalue().splitlines() == planned.lines() and err.getvalue() == ""
    assert planned.memory["program"] > 1 << 20
    half = plan_run(dataclasses.replace(config, dtype="bfloat16"), SETS, Console.silent())
    assert half.memory["weights"] == planned.memory["weights"] // 2
    with pytest.raises(UsageError):
        plan_run(dataclasses.replace(config, include="nothing*"), SETS, Console.silent())


def test_a_dry_run_with_an_adapter(tmp_path):
    model = build_lora("llama", ["q_proj"])
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    adapter = model.peft_config["default"].to_dict()
    (tmp_path / "adapter").mkdir()
    text = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in adapter.items()}, default=str)
    (tmp_path / "adapter" / "adapter_config.json").write_text(text, encoding="utf-8")
    config = dataclasses.replace(
        CONFIG, model=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), include="lora", device="cpu"
    )
    planned = plan_run(config, SETS, Console.silent())
    assert planned.tensors == 4 and planned.parameters == 2 * (3 * 32 + 3 * 32)


def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="its configuration cannot be read") as caught:
        plan_run(dataclasses.replace(CONFIG, model=str(tmp_path)), SETS, Console.silent())
    assert "\n" not in str(caught.value)
