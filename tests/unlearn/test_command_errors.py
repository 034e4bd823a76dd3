"""A user's mistake: one line that says what is wrong and what to do, exit 2, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fillm
from fillm.errors import NumericsError, OutOfMemoryError, UsageError
from fillm.models import load_model, load_tokenizer
from fillm.unlearn import sources
from fillm.unlearn.__main__ import main
from fillm.unlearn.influence import masked_update
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from tests.rank.conftest import word_tokenizer
from tests.unlearn.conftest import save_model

NO_TRAINING = {"lr": None, "max_steps": None, "batch_size": None}


@pytest.fixture
def refused(settings, capsys):
    """`refused(**settings)` runs the command, which has to refuse, and gives its one line."""

    def ran(**changes):
        given = {key: value for key, value in {**settings, **changes}.items() if value is not None}
        words = []
        for key, value in given.items():
            words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        capsys.readouterr()  # of a ranking that was made for this
        assert main(words) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("fillm unlearn: ")]
        assert len(lines) == 1 and out == ""
        assert not any(path.name.startswith("run") for path in Path(settings["out"]).parent.iterdir())
        return lines[0]

    return ran


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "--model: say which model"),
        ({"forget": None}, "--forget: say which rows"),
        ({"retain": None}, "--retain: say which rows"),
        ({"mask": None}, "say where to unlearn: --ranking RUN --select CHOICE, or --mask FILE"),
        ({"select": "top:0.1"}, "--mask and --select: give one"),
        ({"mask": None, "select": "top:0.1"}, "--select chooses from a ranking: give --ranking"),
        ({"ranking": "somewhere"}, "--ranking has no effect beside --mask"),
        ({"include": "mlp"}, "--include has no effect without --select"),
        ({"loss": "forgetting"}, "--loss forgetting: is none of ga, grad-diff"),
        ({"loss": "forgetting"}, "satimp, task-vector, influence"),
        ({"loss": "TaskVector", "beta": 1.0}, "--loss task-vector: its loss is the plain one"),
        ({"loss": "Influence", **NO_TRAINING}, "--loss influence steps along u: give --ranking"),
        ({"loss": "ga", "beta": 1.0}, "--beta 1.0 has no effect"),
        ({"loss": "npo", "beta": -1.0}, "--beta -1.0: give a number above 0"),
        ({"loss": "npo", "eta": 1.0}, "--eta has no effect"),
        ({"loss": "task-vector", "beta": 1.0}, "--beta has no effect"),
        ({"loss": "task-vector", "stop_forget_loss": 1.0}, "--stop-forget-loss has no effect"),
        ({"loss": "idk", "idk": "nowhere.txt"}, "--idk nowhere.txt: No such file"),
        ({"loss": "rmu"}, "--rmu-layer 7: the model has 2 blocks"),
        ({"epochs": 2}, "--epochs and --max-steps: give one"),
        ({"lr": 0}, "--lr 0.0: has to be above 0"),
        ({"weight_decay": -1}, "--weight-decay -1.0: has to be finite, 0 or above"),
        ({"warmup": 3}, "--warmup 3: the run has no more than 3 steps; give fewer, or a fraction"),
        ({"warmup": 20, "max_steps": None}, "--warmup 20: the run has no more than 10 steps"),
        ({"warmup": 9, "dry_run": True}, "--warmup 9: the run has no more than 3 steps"),
        ({"stop_retain_loss": "nan"}, "--stop-retain-loss nan: has to be finite"),
        ({"stop_forget_loss": -2.0}, "--stop-forget-loss -2.0: has to be finite, 0 or above"),
        ({"eval_every": 0}, "--eval-every 0: has to be above 0"),
        ({"num_forget": 8}, "--num-forget 8"),
        ({"resume": True, "overwrite": True}, "--resume continues a run and --overwrite replaces it"),
        ({"mask": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"mask": None, "ranking": "nowhere", "select": "top:0.1"}, "nowhere: no such folder"),
        ({"forget": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "/nowhere"}, "/nowhere: no such folder"),
        (
            {"dtype": "bfloat16"},
            "--dtype bfloat16: model.embed_tokens.weight was saved in float32; rounding would change",
        ),
        ({"lora_rank": 2}, "only a part is selected"),
        ({"loss": "influence", **NO_TRAINING}, "--loss influence steps along u: give --ranking"),
        (
            {"loss": "influence", "ranking": "x", **NO_TRAINING, "lr": 1},
            "it is one step along u, and --lr has no effect",
        ),
    ],
)
def test_settings(changes, words, refused):
    assert words in refused(**changes)


def test_mask_of_another_model(refused, tmp_path, make_ranking):
    other = save_model(tmp_path / "gpt2", "gpt2")
    fillm.Mask.whole(load_model(other, device="cpu"), ["transformer.wte.weight"]).save(tmp_path / "other.safetensors")
    assert "selects from transformer.wte.weight" in refused(mask=str(tmp_path / "other.safetensors"))
    tensors = load_file(Path(save_model(tmp_path / "changed")) / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    ranking = make_ranking("updates", "--save-update")
    given = {"mask": None, "ranking": ranking, "select": "top:0.1"}
    assert "made for other weights" in refused(model=str(tmp_path / "changed"), **given)


def test_mask_of_nothing(refused, tmp_path):
    fillm.Mask({}).save(tmp_path / "empty.safetensors")
    assert "the mask selects no weight" in refused(mask=str(tmp_path / "empty.safetensors"))


def test_influence_without_what_it_needs(refused, make_ranking, tmp_path, model_folder):
    given = {"loss": "influence", **NO_TRAINING, "mask": None, "select": "top:0.1"}
    assert "rank again with --save-update" in refused(ranking=make_ranking("plain"), **given)
    ranking = make_ranking("mlp", "--save-update", "--include", "mlp")
    path = tmp_path / "norm.safetensors"
    fillm.Mask.whole(load_model(model_folder, device="cpu"), ["model.norm.weight"]).save(path)
    line = refused(ranking=ranking, **{**given, "select": None, "mask": str(path)})
    assert "holds no u of model.norm.weight, which the mask selects from" in line


@pytest.mark.parametrize("method", ["wagle", "fisher-ratio", "saliency", "gradient"])
def test_influence_along_what_is_no_u(method, refused, make_ranking):
    """Row rankings of these methods keep something else in update.safetensors."""
    ranking = make_ranking(f"rows-{method}", "--method", method, "--granularity", "row", "--include", "mlp")
    line = refused(loss="influence", **NO_TRAINING, mask=None, select="top:0.1", ranking=ranking)
    assert f"a ranking by {method} has no u; rank with --method soir or soir-sum" in line


def test_influence_along_the_u_of_another_model(refused, make_ranking, tmp_path, model_folder):
    """The mask fits, the ranking beside it does not."""
    given = {"loss": "influence", **NO_TRAINING, "ranking": make_ranking("mlp", "--save-update", "--include", "mlp")}
    model = load_model(model_folder, device="cpu")
    fillm.Mask.from_names(model, ["mlp"]).save(path := tmp_path / "mlp.safetensors")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "changed")
    word_tokenizer().save_pretrained(tmp_path / "changed")
    line = refused(model=str(tmp_path / "changed"), mask=str(path), **given)
    assert "the ranking is of other weights (fingerprints" in line


def test_influence_along_a_u_of_another_shape():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"u of weight has the shape \[2, 4\], here it has \[2, 3\]"):
        masked_update(model, fillm.Mask.whole(model, ["weight"]), {"weight": torch.zeros(2, 4)})


def test_lora_on_what_takes_none(refused, tmp_path, model_folder):
    path = tmp_path / "norm.safetensors"
    fillm.Mask.whole(load_model(model_folder, device="cpu"), ["model.norm.weight"]).save(path)
    assert "model.norm.weight is no linear layer's weight" in refused(mask=str(path), lora_rank=2)


def test_float16(refused, tmp_path):
    assert "give --dtype float32" in refused(model=save_model(tmp_path / "half", dtype=torch.float16))


def test_spoilt_weights(refused, tmp_path):
    tensors = load_file(Path(save_model(tmp_path / "spoilt")) / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "spoilt" / "model.safetensors", {"format": "pt"})
    line = refused(model=str(tmp_path / "spoilt"))
    assert "before the first step: model.norm.weight holds NaN or infinity" in line


def test_rate_that_is_too_high(unlearn):
    with pytest.raises(NumericsError, match=r"not finite at step \d+; lower --lr, or stop earlier"):
        unlearn("run", loss="ga", lr=1e30, max_steps=20)


@pytest.mark.parametrize("bounds", [{}, {"loss": "task-vector"}])
def test_a_model_that_gives_no_numbers_is_never_saved(bounds, unlearn, tmp_path):
    """The only step has a finite gradient, and is so long that the losses after it are not finite."""
    with pytest.raises(NumericsError, match=r"forget and retain loss are (nan|inf) and (nan|inf) after the last step"):
        unlearn("run", lr=1e38, max_steps=1, **bounds)
    assert not (tmp_path / "run").exists()


def test_a_model_before_it_gave_no_numbers_is_kept(unlearn):
    out = unlearn("run", lr=1e38, max_steps=1, stop_retain_loss=1e6)
    told = json.loads((out / "verification.json").read_text())
    assert told["kept_step"] == 0 and told["retain_loss"]["before"] == told["retain_loss"]["after"]


def test_memory_that_runs_out(unlearn, monkeypatch, capsys):
    """The allocator refuses more than one sample: the result is that of whole batches, to rounding."""
    whole = load_model(str(unlearn("whole") / "model"), device="cpu")
    real = sources.Sources.forget_values

    def small(self, loss, model, positions, device, most=1):
        if len(positions) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, loss, model, positions, device)

    monkeypatch.setattr(sources.Sources, "forget_values", small)
    halved = load_model(str(unlearn("halved") / "model"), device="cpu")
    assert capsys.readouterr().err.count("out of memory: going on with") == 2
    for (name, one), (_, other) in zip(whole.named_parameters(), halved.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    monkeypatch.setattr(sources.Sources, "forget_values", lambda *given: small(*given, most=0))
    with pytest.raises(OutOfMemoryError, match=r"a forward pass of 1 sample of up to \d+ tokens; what may fit"):
        unlearn("none")


def test_a_leak_is_never_saved(unlearn, monkeypatch, tmp_path):
    real = MaskedOptimizer.step

    def leaking(optimizer):
        real(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - 1e-3)

    monkeypatch.setattr(MaskedOptimizer, "step", leaking)
    with pytest.raises(RuntimeError, match="weights outside the mask have moved, of model"):
        unlearn("run")
    assert not (tmp_path / "run").exists()


def test_function(model_folder, mask_file, forget_file, retain_file, make_ranking):
    model, tokenizer = load_model(model_folder, device="cpu"), load_tokenizer(model_folder)
    mask, ranking = fillm.Mask.load(mask_file), fillm.Ranking.load(make_ranking("plain"))
    given = (model, tokenizer, forget_file, retain_file)
    for wrong, words in (
        ({}, "give either mask, or ranking and select"),
        ({"mask": mask, "select": "top:0.1"}, "give either mask, or ranking and select"),
        ({"select": "top:0.1"}, "give ranking, a fillm.Ranking of this model"),
        ({"mask": mask, "loss": "influence"}, "give ranking, a fillm.Ranking of this model"),
        ({"mask": mask, "device": "cpu"}, "device: a setting of the command"),
        ({"mask": mask, "loss": "Influence"}, "give ranking, a fillm.Ranking of this model"),
        ({"mask": mask, "ranking": ranking, "loss": "npo"}, "ranking has no effect beside mask"),
        ({"mask": mask, "resume": True}, "resume and overwrite need out"),
        ({"mask": mask, "rate": 1.0}, "no setting is called 'rate'"),
        ({"mask": mask, "warmup": 4, "max_steps": 4}, "--warmup 4: the run has no more than 4 steps"),
    ):
        with pytest.raises(UsageError, match=words):
            fillm.unlearn_model(*given, **wrong)
    with pytest.raises(UsageError, match="give the loaded model"):
        fillm.unlearn_model(model_folder, tokenizer, forget_file, retain_file, mask=mask)


def test_rows_without_questions(settings, tmp_path, refused):
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) + "\n")
    assert "has no question to answer otherwise" in refused(forget=str(path), loss="idk")


def test_a_mask_that_the_loss_does_not_see(unlearn, tmp_path, model_folder):
    path = tmp_path / "norm.safetensors"
    fillm.Mask.whole(load_model(model_folder, device="cpu"), ["model.layers.1.mlp.up_proj.weight"]).save(path)
    with pytest.raises(UsageError, match="the loss depends on no selected weight"):
        unlearn("run", mask=str(path), loss="rmu", rmu_layer=0)
