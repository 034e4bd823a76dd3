"""`python -m fillm.unlearn` from start to end: every loss, what the folder holds, what is promised of it."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fillm
from fillm.config import read_settings
from fillm.models import load_model, load_tokenizer, model_fingerprint, with_lora
from fillm.unlearn.__main__ import main
from fillm.unlearn.losses import GRADIENT_LOSSES
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from tests.rank.conftest import word_tokenizer
from tests.unlearn.conftest import mixed_mask, save_model

OWN = {"rmu": {"rmu_layer": 1}}


def weights(folder):
    return dict(load_model(str(folder), dtype="auto", device="cpu").named_parameters())


def assert_only_inside_changed(before, after, mask):
    """Bits, compared tensor by tensor, by nothing that the command itself uses."""
    changed = 0
    assert before.keys() == after.keys()
    for name, start in before.items():
        assert start.dtype == after[name].dtype
        same = start.view(torch.uint8).eq(after[name].view(torch.uint8)).view(*start.shape, -1).all(-1)
        inside = mask[name].to_bool() if name in mask else torch.zeros(start.shape, dtype=torch.bool)
        assert bool(same[~inside].all()), name
        changed += int((~same).sum())
    return changed


@pytest.mark.parametrize("loss", [*GRADIENT_LOSSES, "task-vector"])
def test_every_loss(loss, unlearn, model_folder, mask_file):
    folder = unlearn("run", loss=loss, weight_decay=0.1, **OWN.get(loss, {}))
    told = json.loads((folder / "verification.json").read_text())
    mask = fillm.Mask.load(mask_file)
    changed = assert_only_inside_changed(weights(model_folder), weights(folder / "model"), mask)
    assert told["outside_mask_bit_equal"] and told["mask_applied"] and told["differing"] == []
    assert 0 < changed == told["changed_parameters"] <= told["selected_parameters"] == mask.count
    log = pq.read_table(folder / "log.parquet").to_pydict()
    assert log["step"] == [1, 2, 3]
    assert log["epoch"] == [1, 1, 2]
    assert log["forget_loss"][1] is not None and log["forget_loss"][0] is None
    # The schedule ends above 0, so the last evaluation is that of the last step, of the weights that were saved.
    if loss != "task-vector":
        assert told["forget_loss"]["after"] == log["forget_loss"][-1]
        assert told["retain_loss"]["after"] == log["retain_loss"][-1]
    assert fillm.Mask.load(folder / "mask.safetensors") == mask


@pytest.mark.parametrize("loss", ["ga", "grad-diff", "npo", "task-vector"])
def test_forgets(loss, unlearn):
    folder = unlearn("run", loss=loss, max_steps=8)
    told = json.loads((folder / "verification.json").read_text())
    assert told["forget_loss"]["after"] > told["forget_loss"]["before"]


def test_losses_are_those_of_the_saved_model(unlearn, forget_file, retain_file):
    folder = unlearn("run", eval_retain=0)
    told = json.loads((folder / "verification.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for path, name in ((forget_file, "forget_loss"), (retain_file, "retain_loss")):
        losses = []
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            picked = [logits[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
            losses.append(-float(sum(picked)) / len(picked))
        assert told[name]["after"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_replays(unlearn, capsys):
    folder = unlearn("run", loss="npo", optimizer="sophia", clip_norm=0.5)
    again = folder.with_name("again")
    assert main(["--config", str(folder / "run.yaml"), "--out", str(again)]) == 0
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert (folder / "mask.safetensors").read_bytes() == (again / "mask.safetensors").read_bytes()
    assert "bit-equal to the start" in capsys.readouterr().out


def test_record(unlearn, model_folder):
    folder = unlearn("run")
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["fingerprints"]["initial_model"] == model_fingerprint(load_model(model_folder, device="cpu"))
    assert record["fingerprints"]["model"] == model_fingerprint(load_model(str(folder / "model"), device="cpu"))
    assert record["result"]["savings"]["layers_without_backward"] == 0
    assert record["settings"]["epochs"] is None
    assert read_settings(str(folder / "run.yaml"))["loss"] == "grad-diff"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_sophia_estimates_the_curvature_every_ten_steps(dtype, unlearn, work, monkeypatch):
    narrow = save_model(work / f"narrow-{dtype}", dtype=torch.bfloat16)
    taken, estimate, curvature = [], MaskedOptimizer.estimate, []

    def watched(self, *given):
        taken.append(max((int(state["step"]) for state in self.state.values()), default=0))
        estimate(self, *given)
        curvature.append(all(bool(state["hessian"].any()) for state in self.state.values()))

    monkeypatch.setattr(MaskedOptimizer, "estimate", watched)
    unlearn("run", model=narrow, dtype=dtype, optimizer="sophia", max_steps=12, lr=1e-3)
    assert taken == [0, 10] and all(curvature)


@pytest.mark.parametrize("changes", [{"gradient_accumulation": 4, "batch_size": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("loss", ["kl", "rmu"])
@pytest.mark.parametrize("optimizer", ["adamw", "sophia"])
def test_how_a_step_is_cut_up_does_not_matter(changes, loss, optimizer, settings, work):
    settings = {name: value for name, value in settings.items() if name not in ("model", "mask", "device", "out")}
    after = []
    for further in ({}, changes):
        # Either optimiser magnifies the rounding of a small gradient: in float64 nothing of it is seen.
        model = load_model(save_model(work / "llama64", dtype=torch.float64), dtype="auto", device="cpu").double()
        given = {**settings, "loss": loss, "optimizer": optimizer, **OWN.get(loss, {}), **further}
        fillm.unlearn_model(model, word_tokenizer(), mask=mixed_mask(model), **given)
        after.append(dict(model.named_parameters()))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-7, atol=1e-9)


def test_bfloat16_stays_bfloat16(unlearn, tmp_path):
    start = save_model(tmp_path / "narrow", dtype=torch.bfloat16)
    mask = fillm.Mask.whole(load_model(start, device="cpu"), ["model.layers.1.mlp.up_proj.weight"])
    mask.save(tmp_path / "whole.safetensors")
    for changes in ({}, {"dtype": "float32"}, {"mixed_precision": "bf16"}):
        given = {"model": start, "mask": str(tmp_path / "whole.safetensors"), "overwrite": True, "weight_decay": 0.1}
        folder = unlearn("run", **given, **changes)
        after = weights(folder / "model")
        assert {value.dtype for value in after.values()} == {torch.bfloat16}
        assert assert_only_inside_changed(weights(start), after, mask) > 0


def test_small_bfloat16_steps_add_up(unlearn, tmp_path):
    start = save_model(tmp_path / "narrow", dtype=torch.bfloat16)
    mask = fillm.Mask.whole(load_model(start, device="cpu"), ["model.norm.weight"])
    mask.save(tmp_path / "norm.safetensors")
    # A weight of 1 moves in steps of 1/128 or 1/256: each of these alone is below half of that, and would be lost.
    given = {"model": start, "mask": str(tmp_path / "norm.safetensors"), "lr": 1e-3, "max_steps": 40}
    told = json.loads((unlearn("run", **given) / "verification.json").read_text())
    assert told["changed_parameters"] > told["selected_parameters"] / 2


def test_ranking_of_the_same_weights_in_another_type(unlearn, tmp_path, forget_file, retain_file):
    start = save_model(tmp_path / "narrow", dtype=torch.bfloat16)
    model, tokenizer = load_model(start, device="cpu"), load_tokenizer(start)  # float32, as fillm.rank takes it
    ranking = fillm.rank_parameters(model, tokenizer, forget_file, retain_file)
    ranking.save(tmp_path / "ranking")
    folder = unlearn("run", model=start, mask=None, ranking=str(tmp_path / "ranking"), select="bottom:0.3:tensors")
    assert json.loads((folder / "verification.json").read_text())["mask_applied"]


@pytest.mark.parametrize(("granularity", "choice"), [("row", "top:0.1"), ("head", "top:0.3"), ("element", "top:0.05")])
def test_every_granularity(granularity, choice, make_ranking, unlearn, model_folder):
    ranking = make_ranking(
        granularity, "--granularity", granularity, *(["--include", "attn"] if granularity == "head" else [])
    )
    folder = unlearn("run", mask=None, ranking=ranking, select=choice, weight_decay=0.1, optimizer="sophia")
    mask = fillm.Mask.load(folder / "mask.safetensors")
    assert assert_only_inside_changed(weights(model_folder), weights(folder / "model"), mask) > 0


def test_lora(unlearn, model_folder, tmp_path):
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    mask = fillm.Mask.whole(load_model(model_folder, device="cpu"), names)
    mask.save(tmp_path / "two.safetensors")
    folder = unlearn("run", mask=str(tmp_path / "two.safetensors"), lora_rank=2, max_steps=5)
    after = weights(folder / "model")
    assert assert_only_inside_changed(weights(model_folder), after, mask) > 0
    adapted = load_model(model_folder, adapter=str(folder / "adapter"), device="cpu").merge_and_unload()
    for name, value in adapted.named_parameters():
        assert torch.equal(value, after[name])
    assert {name for name, value in after.items() if not torch.equal(value, weights(model_folder)[name])} == set(names)


def test_weights_of_an_adapter(unlearn, model_folder, tmp_path):
    trained = unlearn("first", lora_rank=2, mask=_whole(model_folder, tmp_path, ["model.layers.0.mlp.up_proj.weight"]))
    model = load_model(model_folder, adapter=str(trained / "adapter"), device="cpu")
    names = [name for name, _ in model.named_parameters() if "lora_B" in name]
    fillm.Mask.whole(model, names).save(tmp_path / "b.safetensors")
    folder = unlearn("second", adapter=str(trained / "adapter"), mask=str(tmp_path / "b.safetensors"))
    again = load_model(model_folder, adapter=str(folder / "adapter"), device="cpu")
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)
    for name, value in again.merge_and_unload().named_parameters():
        assert torch.equal(value, weights(folder / "model")[name])


def _whole(model_folder, tmp_path, names):
    path = tmp_path / "whole.safetensors"
    fillm.Mask.whole(load_model(model_folder, device="cpu"), names).save(path)
    return str(path)


def test_influence(make_ranking, unlearn, model_folder):
    ranking = make_ranking("updates", "--save-update")
    given = {"mask": None, "ranking": ranking, "select": "top:0.5", "lr": None, "max_steps": None, "batch_size": None}
    folder = unlearn("run", **given, loss="influence", eval_retain=0)
    told = json.loads((folder / "verification.json").read_text())
    mask, updates = fillm.Mask.load(folder / "mask.safetensors"), fillm.Ranking.load(ranking).updates
    before, after = weights(model_folder), weights(folder / "model")
    assert assert_only_inside_changed(before, after, mask) > 0
    for name, entry in mask.items():
        stepped = before[name].double() - told["influence"]["eta"] * updates[name].double() * entry.to_bool()
        assert torch.equal(after[name], stepped.float())
    for which in ("forget", "retain"):
        change = told["influence"][f"{which}_change"]
        assert change["measured"] == told[f"{which}_loss"]["after"] - told[f"{which}_loss"]["before"]
        assert change["measured"] == pytest.approx(change["predicted"], rel=0.2)
    assert told["influence"]["forget_change"]["predicted"] == pytest.approx(0.01)
    assert told["influence"]["curvature_by"] == "two backward passes"
    half = unlearn("half", **given, loss="influence", eta=told["influence"]["eta"] / 2)
    less = json.loads((half / "verification.json").read_text())["influence"]
    for which in ("forget_change", "retain_change"):
        whole, part = told["influence"][which], less[which]
        assert part["first_order"] == pytest.approx(whole["first_order"] / 2)
        second = whole["predicted"] - whole["first_order"]
        assert part["predicted"] - part["first_order"] == pytest.approx(second / 4, rel=1e-6)


def test_task_vector_goes_the_other_way(unlearn, model_folder):
    before = weights(model_folder)
    learned = weights(unlearn("learned", loss="task-vector", eta=1e-300) / "model")
    negated = weights(unlearn("negated", loss="task-vector", eta=0.5) / "model")
    doubled = weights(unlearn("doubled", loss="task-vector", eta=1.0) / "model")
    for name, start in before.items():
        assert torch.equal(learned[name], start)
        way = doubled[name].double() - start.double()
        torch.testing.assert_close(negated[name].double() - start.double(), way / 2, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "remedy"), [({"lr": 1e-9}, "--lr, or more --epochs,"), ({"loss": "task-vector", "eta": 1e-3}, "--eta")]
)
def test_a_run_that_forgets_next_to_nothing_says_so(unlearn, capsys, changes, remedy):
    unlearn("run", **changes)
    assert f"next to nothing is forgotten; a larger {remedy} forgets more" in capsys.readouterr().err


def test_stops_when_forgotten_and_keeps_the_best(unlearn, capsys):
    told = json.loads((unlearn("free", max_steps=20, eval_every=1) / "verification.json").read_text())
    target = told["forget_loss"]["before"] + 0.3 * (told["forget_loss"]["after"] - told["forget_loss"]["before"])
    folder = unlearn("stopped", max_steps=20, eval_every=1, stop_forget_loss=target)
    found = json.loads((folder / "verification.json").read_text())
    assert found["forget_loss"]["after"] >= target
    assert 0 < found["steps"] == found["kept_step"] < 20
    assert found["stopped"].startswith("forget loss")
    assert "next to nothing" not in capsys.readouterr().err


def test_goes_back_when_too_much_is_lost(unlearn, model_folder):
    given = {"loss": "ga", "max_steps": 30, "eval_every": 1, "lr": 3e-2}
    told = json.loads((unlearn("free", **given) / "verification.json").read_text())
    bound = told["retain_loss"]["before"] + 0.1 * (told["retain_loss"]["after"] - told["retain_loss"]["before"])
    folder = unlearn("bounded", **given, stop_retain_loss=bound)
    found = json.loads((folder / "verification.json").read_text())
    log = pq.read_table(folder / "log.parquet").to_pydict()
    assert log["retain_loss"][-1] > bound >= found["retain_loss"]["after"]
    assert found["kept_step"] < found["steps"] < 30
    kept = log["step"].index(found["kept_step"]) if found["kept_step"] else None
    if kept is not None:
        assert found["forget_loss"]["after"] == max(
            loss for loss, kept_loss in zip(log["forget_loss"], log["retain_loss"], strict=True) if kept_loss <= bound
        )


def test_nothing_within_the_bound_leaves_the_model_as_it_was(unlearn, model_folder, capsys):
    folder = unlearn("run", stop_retain_loss=1e-6)
    found = json.loads((folder / "verification.json").read_text())
    assert found["steps"] == found["kept_step"] == 0 and not found["mask_applied"]
    assert "no selected weight has changed" in capsys.readouterr().err
    before, after = weights(model_folder), weights(folder / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_samples_reach_their_own_mask_alone(make_ranking, unlearn, model_folder, forget_file):
    """One SGD-like step is told apart by which tensors moved: with one sample a step, only its own."""
    ranking = make_ranking("per_sample", "--method", "soir-per-sample")
    masks = fillm.Ranking.load(ranking).select_per_sample(fraction=0.1, of="tensors")
    assert len({frozenset(mask) for mask in masks.values()}) > 1
    given = {"mask": None, "ranking": ranking, "select": "top:0.1:tensors", "loss": "ga", "max_steps": 1}
    before = weights(model_folder)
    after = weights(unlearn("one", **given, num_forget=1, batch_size=1) / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    union = set().union(*masks.values())
    assert moved in [set(mask) for mask in masks.values()] and moved < union
    after = weights(unlearn("all", **given, batch_size=7) / "model")
    assert {name for name in before if not torch.equal(before[name], after[name])} == union


def test_dry_run(unlearn, settings, capsys):
    unlearn("run", dry_run=True, loss="npo", retain_loss="kl")
    out = capsys.readouterr().out
    for words in (
        "7 samples",
        "never formed",
        "optimiser state",
        "3 steps of 4",
        "reference of forget",
        "retain: about",
    ):
        assert words in out
    assert not any(path.name.startswith("run") for path in Path(settings["out"]).parent.iterdir())


@pytest.mark.parametrize("changes", [{"loss": "ga"}, {"loss": "npo", "lora_rank": 2}])
def test_a_dry_run_says_what_the_run_says(changes, unlearn, work, mask_file, capsys, tmp_path):
    """Of bfloat16 weights, which have masters, and of adapters, which have none."""
    model = save_model(work / "narrow", dtype=torch.bfloat16)
    fillm.Mask.from_names(load_model(model, device="cpu"), ["mlp"]).save(path := tmp_path / "mlp.safetensors")
    given = {**changes, "model": model, "mask": str(path)}
    unlearn("dry", dry_run=True, **given)
    told = capsys.readouterr().out.splitlines()
    unlearn("run", **given)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("training ", "weight grad"))]
    assert len(said) == 2 and set(said) <= set(told)
    assert ("retain samples" in " ".join(told)) == (changes["loss"] != "ga")
    selected = 2 * 3 * 32 * 56
    assert said[1].endswith(f"float32 masters: {4 * selected / 1024:.1f} KiB") == ("lora_rank" not in changes)


def test_the_merged_model_of_an_adapter_keeps_its_types(unlearn, work, tmp_path):
    model = save_model(work / "narrow", dtype=torch.bfloat16)
    adapted = with_lora(load_model(model, dtype="auto", device="cpu"), 2, 0)
    adapted.save_pretrained(tmp_path / "adapter")
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    fillm.Mask.whole(adapted, names).save(path := tmp_path / "lora.safetensors")
    folder = unlearn("run", model=model, adapter=str(tmp_path / "adapter"), mask=str(path), dtype="float32")
    assert {value.dtype for value in load_file(folder / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_python(model_folder, forget_file, retain_file, tmp_path):
    model, tokenizer = load_model(model_folder, device="cpu"), load_tokenizer(model_folder)
    model.train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    mask = fillm.Mask.whole(model, ["model.layers.1.mlp.up_proj.weight"])
    rows = [json.loads(line) for line in Path(forget_file).read_text().splitlines()]
    result = fillm.unlearn_model(
        model, tokenizer, rows, retain_file, mask=mask, loss="NPO", lr=1e-2, max_steps=3, out=str(tmp_path / "out")
    )
    assert result.model is model and model.training and not any(p.requires_grad for p in model.parameters())
    assert (
        assert_only_inside_changed(before, dict(model.named_parameters()), mask)
        == result.verification.changed_parameters
    )
    saved = weights(tmp_path / "out" / "model")
    assert all(torch.equal(saved[name], value) for name, value in model.named_parameters())
    assert len(result.log) == 3 and math.isfinite(result.after.forget)
    again = load_model(model_folder, device="cpu")
    fillm.unlearn_model(again, tokenizer, forget_file, retain_file, mask=mask, loss="npo", lr=1e-2, max_steps=3)
    assert model_fingerprint(again) == model_fingerprint(model)
