"""Plans for several devices: what each holds, does, moves and receives, against sums by hand."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import transformers

from fillm.errors import ModelError, UsageError
from fillm.models import catalogue
from fillm.rank.__main__ import main
from fillm.rank.config import RankConfig, check
from fillm.rank.costs import batch_shapes
from fillm.rank.plan import plan
from fillm.rank.plan_devices import Devices
from fillm.rank.plan_lines import Rates, in_bytes
from tests.families import build_family
from tests.rank.conftest import write_rows
from tests.rank.test_plan import CONFIG, RATES, SETS, sample_set

ROWS = [{"input_ids": list(range(3, 15 + n)), "labels": [-100] * 4 + list(range(7, 15 + n))} for n in range(5)]


def planned(devices=1, sets=SETS, rates=RATES, model=None, **changes):
    model = model or build_family("llama")
    config = dataclasses.replace(CONFIG, **changes)
    return plan(model, catalogue(model), sets, config, rates=rates, devices=devices)


@pytest.mark.parametrize("rows", [1, 2, 7, 97, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_a_sharded_tensor_is_cut_as_torch_chunks_it(rows, count):
    chunks = torch.empty(rows, 5).chunk(count)
    assert Devices(count, sharded=True).held((rows, 5)) == max(chunk.numel() for chunk in chunks)
    assert Devices(count).held((rows, 5)) == rows * 5 and Devices(count, sharded=True).held(()) == 1


def test_batches_are_dealt_forwards_and_backwards():
    # Rounds 0 1 | 3 2 | 4: the first device has batches 0, 3 and 4, the second 1 and 2.
    assert Devices(2).dealt([5.0, 4.0, 1.0, 2.0, 0.5], led=False) == [0, 3, 4]
    assert Devices(2).dealt([5.0, 40.0, 1.0, 2.0, 0.5], led=False) == [1, 2]
    # The first is a round by itself: 0 | 2 1 | 3 4; and of shards all wait for the largest of a round.
    assert Devices(2).dealt([5.0, 4.0, 1.0, 2.0, 0.5], led=True) == [0, 2, 3]
    assert Devices(2, sharded=True).dealt([5.0, 4.0, 1.0, 2.0, 0.5], led=True) == [0, 1, 3]
    assert Devices().dealt([1.0, 2.0, 3.0], led=True) == [0, 1, 2]


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_work_is_divided_and_never_less_than_a_part(count, shard):
    alone, of_a_device = planned(), planned(count, shard=shard)
    for name, flop in alone.flop.items():
        assert flop / count <= of_a_device.flop[name] * (1 + 1e-12) and of_a_device.flop[name] <= flop
    assert of_a_device.received > 0.0 == alone.received
    told = [(one.samples, one.tokens, one.batches) for one in of_a_device.passes]
    assert told == [(one.samples, one.tokens, one.batches) for one in alone.passes]


def test_with_samples_dealt_out_each_device_holds_everything():
    alone, two = planned(), planned(2)
    assert two.memory == alone.memory and two.devices == 2
    sums = 4 * sum(info.numel for info in catalogue(build_family("llama")))
    # v after the forget pass and w after the retain pass: a half comes from the other in each of two steps.
    assert [one.received for one in two.passes] == [sums, sums]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_shards_divide_weights_and_sums(family):
    model = build_family(family)
    infos, parts = catalogue(model), Devices(2, sharded=True)
    memory = planned(2, model=model, shard=True).memory
    held = sum(max(c.numel() for c in p.chunk(2)) for p in model.parameters())
    assert memory["weights"] == memory["mean forget gradient v"] == 4 * held
    inside = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    total = sum(p.numel() for p in model.parameters())
    assert memory["embeddings and head, gathered"] == 4 * (total - sum(inside))
    assert memory["two layers, gathered"] == 4 * 2 * max(inside)
    largest = max(8 * i.numel + 8 * parts.held(i.shape) for i in infos)
    assert 0 <= memory["a tensor's sums and what the others send"] <= 2 * largest
    if family == "llama":  # its head is handed out while all activations are there
        head = model.lm_head.weight
        assert memory["a tensor's sums and what the others send"] >= 8 * head.numel() + 8 * parts.held(head.shape)


def _layers(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def test_what_shards_receive_by_hand():
    model = build_family("llama")
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    forget, retain = planned(2, model=model, shard=True).passes
    half = 0.5 * 4
    # A round: layers for forward and backward, the rest once, and a tensor of sums (and v for a dot) for each product.
    assert forget.received == math.ceil(forget.batches / 2) * half * (total + inside + total)
    rounds = 1 + math.ceil((retain.batches - 1) / 2)
    assert retain.received == rounds * half * (total + inside + 2 * total)


def test_bytes_moved_by_hand():
    model = build_family("llama")
    total = sum(p.numel() for p in model.parameters())
    looked_up = model.model.embed_tokens.weight.numel()
    found = planned(model=model)
    forget, retain = found.passes
    answered = sum(shape.answered for shape in batch_shapes(SETS["forget"], 48, "right"))
    logits = 4 * 97 * answered
    assert forget.moved["backward of activations"] - forget.moved["forward"] == logits
    kept = forget.moved["forward"] - logits - forget.batches * 4 * (total - looked_up)
    shapes = [s for some in SETS.values() for s in batch_shapes(some, 48, "right")]
    tokens = sum(s.tokens for s in batch_shapes(SETS["forget"], 48, "right"))
    assert kept == pytest.approx(found.memory["activations"] * tokens / max(s.tokens for s in shapes))
    # Norms read the factors once; v is read once a batch, w read and written, each with the factors.
    factors = retain.moved["ghost norms"]
    assert retain.moved["products with weights in scope"] == retain.batches * 4 * 3 * total + 2 * factors


def test_each_part_takes_what_is_longer():
    bound_by_flop = planned(rates=Rates(1e6, 1e15))
    bound_by_bytes = planned(rates=Rates(1e15, 1e6))
    assert bound_by_flop.seconds == pytest.approx(sum(bound_by_flop.flop.values()) / 1e6)
    attention = "attention, forward and backward"
    moved = {name: value for name, value in bound_by_bytes.moved.items() if name != attention}
    assert bound_by_bytes.seconds == pytest.approx(sum(moved.values()) / 1e6, rel=1e-4)  # attention moves nothing
    linked = planned(2, rates=Rates(1e15, 1e15, 1e3), shard=True)
    assert linked.seconds == pytest.approx(linked.received / 1e3, rel=1e-3)
    assert planned(2, shard=True).link_seconds == 0.0


def test_the_lines_of_several_devices():
    shown = "\n".join(planned(2, shard=True, rates=Rates(2e12, 3e9, measured=["flops"])).lines())
    for text in (
        "memory of a device", "work of a device", "from other devices", "no rate: give --plan-link",
        "at 2.0 TFLOP/s (measured), 3.0 GB/s of memory (given)",
    ):  # fmt: skip
        assert text in shown
    assert "40.0 GB/s from other devices (given)" in planned(2, rates=Rates(1.0, 1.0, 4e10)).lines()[-3]
    assert [in_bytes(n << 20) for n in (3, 1536, 3 << 20)] == ["3.0 MiB", "1.50 GiB", "3.00 TiB"]


def test_the_check_before_the_passes_may_take_more():
    model = build_family("llama", dtype=torch.bfloat16)
    few = {which: sample_set([8], prompt=7) for which in SETS}
    scope = [info for info in catalogue(model) if info.kind == "norm"]
    found = {device: plan(model, scope, few, CONFIG, rates=RATES, device_type=device) for device in ("cpu", "cuda")}
    copy = 4 * sum(p.numel() for p in model.parameters())
    line = "copy in float32, to compare gradients"
    assert found["cpu"].memory[line] == copy
    assert any("the check before the passes" in note for note in found["cpu"].notes)
    assert line not in found["cuda"].memory  # it lies in CPU memory where the device has no room
    sharded = planned(2, sets=few, shard=True).memory
    assert ("gradients of two samples" in sharded) != ("weighted sums" in sharded)


def test_a_model_whose_layers_are_not_told_is_not_sharded(monkeypatch):
    monkeypatch.setattr("fillm.rank.plan_shards.decoder_layers", lambda model: [])
    with pytest.raises(ModelError, match="decoder layers"):
        planned(2, shard=True)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"plan_devices": 2}, "--plan-devices 2 has no effect without --dry-run"),
        ({"plan_flops": 1e12}, "--plan-flops 1000000000000.0 has no effect without --dry-run"),
        ({"plan_bandwidth": 1e9}, "--plan-bandwidth .* has no effect without --dry-run"),
        ({"plan_link": 1e9}, "--plan-link .* has no effect without --dry-run"),
        ({"dry_run": True, "plan_devices": 0}, "--plan-devices must be above 0 and finite, not 0"),
        ({"dry_run": True, "plan_flops": math.inf}, "--plan-flops must be above 0 and finite, not inf"),
        ({"dry_run": True, "plan_link": math.nan}, "--plan-link must be above 0 and finite, not nan"),
    ],
)
def test_what_only_a_plan_looks_at(given, line):
    with pytest.raises(UsageError, match=line):
        check(RankConfig(model="m", **given))


def test_shards_are_planned_from_a_configuration_alone(tmp_path, capsys):
    build_family("llama").config.save_pretrained(tmp_path / "model")
    data = {which: write_rows(tmp_path / f"{which}.jsonl", ROWS) for which in ("forget", "retain")}
    argv = ["--model", str(tmp_path / "model"), "--forget", data["forget"], "--retain", data["retain"]]
    argv += ["--device", "cpu", "--dry-run", "--plan-flops", "4e14", "--plan-bandwidth", "3e12", "--plan-link", "5e10"]
    assert main([*argv, "--shard", "--plan-devices", "64"]) == 0
    sharded = capsys.readouterr().out
    assert "devices" in sharded and "400.0 TFLOP/s (given)" in sharded and "two layers, gathered" in sharded
    assert main([*argv, "--plan-devices", "64"]) == 0
    assert "two layers, gathered" not in capsys.readouterr().out
    assert main([*argv, "--shard", "--plan-devices", "64", "--compression", "sjlt"]) == 2
    assert "--shard does not take --compression sjlt" in capsys.readouterr().err


@pytest.mark.slow
def test_405_billion_parameters_on_64_devices(tmp_path, capsys):
    """The example of the tutorial, but for the lines that depend on the process."""
    config = transformers.LlamaConfig(
        hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        intermediate_size=53248, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--dtype", "auto", "--device", "cpu", "--shard"]
    for which, count in (("forget", 64), ("retain", 640)):
        ids = [[3 + number, *range(3, 514)] for number in range(count)]
        rows = [{"input_ids": one, "labels": [-100] * 256 + one[256:]} for one in ids]
        argv += [f"--{which}", write_rows(tmp_path / f"{which}.jsonl", rows)]
    page = (Path(__file__).resolve().parents[2] / "docs/tutorials/cluster.md").read_text(encoding="utf-8")
    asked = re.search(r"--shard (--gradient-checkpointing) .*?(--dry-run .*?)$", page, re.DOTALL | re.MULTILINE)
    assert main([*argv, asked[1], *asked[2].split()]) == 0
    said = capsys.readouterr().out.splitlines()
    shown, by_groups = (part.partition("```")[0].splitlines() for part in page.split("```text\n")[1:])
    assert [line for line in said if line in shown] == shown and len(shown) > 15
    # Weights, 2 bytes each: all first axes are multiples of 64. Sums, 4 bytes each.
    assert f"{405_853_388_800 * 2 / 64 / 2**30:.2f} GiB" in next(line for line in said if "  weights " in line)
    groups = re.search(r"`(--groups \d)`", page.partition("405B")[2])
    assert main([*argv, asked[1], *groups[1].split(), *asked[2].split()]) == 0
    said = capsys.readouterr().out.splitlines()
    peak = "  expected peak"  # which the process's own memory is part of
    without = [line for line in by_groups if not line.startswith(peak)]
    assert [line for line in said if line in without] == without and len(without) > 3
    peaks = [float(line.split()[2]) for line in (*said, *by_groups) if line.startswith(peak)]
    assert abs(peaks[0] - peaks[1]) < 0.5 and peaks[0] * 2**30 < 75e9
