"""From settings to a model folder: what it holds, what it learned, and the line each mistake gets."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fillm.data import load_rows, tokenize_rows
from fillm.errors import DataError, NumericsError, OutOfMemoryError, RunFolderError, UsageError
from fillm.finetune import training
from fillm.finetune.__main__ import main
from fillm.finetune.progress import TrainingProgress
from fillm.models import load_model, load_tokenizer, model_fingerprint


def _weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_folder_opens_and_says_how_it_was_made(train, data, tmp_path):
    result = train("out", eval_data=data)
    assert result.folder == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    model, tokenizer = load_model(str(result.folder), device="cpu"), load_tokenizer(str(result.folder))
    assert model_fingerprint(model) == result.fingerprint
    record = yaml.safe_load((result.folder / "run.yaml").read_text())
    assert record["settings"]["lr"] == 1e-2
    assert record["fingerprints"]["model"] == result.fingerprint
    assert record["versions"]["torch"] == torch.__version__
    log = pq.read_table(result.folder / "log.parquet").to_pydict()
    assert log["step"] == list(range(1, 10))
    assert log["epoch"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(log["samples"]) == [3] * 3 + [4] * 6
    assert [value is not None for value in log["eval_loss"]] == [False, False, True] * 3
    assert log["eval_loss"][-1] == result.eval_loss == record["result"]["eval_loss"]
    samples = tokenize_rows(load_rows(data), tokenizer)
    assert record["fingerprints"]["data"] == samples.fingerprint
    with torch.no_grad():
        each = training.sample_losses(model, samples, range(len(samples)), torch.device("cpu"))
    assert each.mean().item() == pytest.approx(result.eval_loss, rel=1e-5)
    assert result.epoch_losses[0] > result.loss == result.epoch_losses[-1]
    weighted = sum(loss * n for loss, n in zip(log["loss"][-3:], log["samples"][-3:], strict=True)) / 11
    assert result.loss == pytest.approx(weighted)


def test_weights_are_as_readable_as_the_record(train):
    folder = train("out").folder
    assert (folder / "model.safetensors").stat().st_mode == (folder / "run.yaml").stat().st_mode


def test_it_can_learn_the_rows_by_heart_and_stops_there(train):
    result = train("out", epochs=300, target_loss=0.2, lr=2e-2)
    assert result.loss < 0.2
    assert result.steps == 3 * len(result.epoch_losses) < 900
    assert all(loss >= 0.2 for loss in result.epoch_losses[:-1])


def test_same_seed_same_bytes_other_seed_other_weights(train):
    files = [train(name, seed=seed).folder / "model.safetensors" for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("settings", "steps"), [({"warmup": 9}, 9), ({"warmup": 3, "epochs": None, "max_steps": 2}, 2)]
)
def test_a_warmup_as_long_as_the_run_is_refused_before_a_model_is_made(train, tmp_path, settings, steps):
    # Eleven rows in batches of 4 are 3 steps an epoch; the architecture of no folder is not looked for.
    said = f"--warmup {settings['warmup']}: the run has no more than {steps} steps; give fewer, or a fraction"
    with pytest.raises(UsageError, match=f"^{said}$"):
        train("out", architecture=str(tmp_path / "none.json"), **settings)
    assert not list(tmp_path.glob("out*"))


def test_training_leaves_the_random_state_alone(train):
    before = torch.get_rng_state()
    train("out")
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_is_one_large_batch(train, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}))
    whole = train("whole", batch_size=6)
    parts = train("parts", batch_size=2, gradient_accumulation=3)
    assert parts.steps == whole.steps
    assert parts.epoch_losses == pytest.approx(whole.epoch_losses, rel=1e-3)


def test_max_steps(train):
    result = train("out", epochs=None, max_steps=4, eval_data=None)
    assert result.steps == 4
    assert len(result.epoch_losses) == 2


def test_only_matrices_decay(train):
    plain, decayed = (
        train("plain", max_steps=1, epochs=None),
        train("decayed", max_steps=1, epochs=None, weight_decay=0.5),
    )
    before, after = _weights(plain.folder), _weights(decayed.folder)
    for name in before:
        assert torch.equal(before[name], after[name]) == (before[name].ndim < 2), name


def test_a_given_model_goes_on_learning(train, tmp_path):
    first = train("first")
    second = train("second", model=str(first.folder), vocab_size=None, lr=5e-3)
    assert second.loss < first.loss
    record = yaml.safe_load((second.folder / "run.yaml").read_text())
    assert record["fingerprints"]["initial_model"] == first.fingerprint
    tokenizers = [load_tokenizer(str(run.folder)) for run in (first, second)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_rows_in_memory(train, data):
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    memory = train("memory", rows=rows)
    assert memory.fingerprint == train("file").fingerprint


def test_lora_is_saved_merged_and_apart(train):
    base = train("base")
    tuned = train("tuned", model=str(base.folder), vocab_size=None, lora_rank=2, lr=2e-2)
    assert tuned.loss < base.loss
    ids = torch.arange(5, 20)[None]
    merged = load_model(str(tuned.folder), device="cpu")
    apart = load_model(str(base.folder), adapter=str(tuned.folder / "adapter"), device="cpu")
    untouched = load_model(str(base.folder), device="cpu")
    assert torch.allclose(merged(input_ids=ids).logits, apart(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(merged(input_ids=ids).logits, untouched(input_ids=ids).logits, atol=1e-2)
    assert torch.equal(
        _weights(tuned.folder)["transformer.wte.weight"], _weights(base.folder)["transformer.wte.weight"]
    )


def test_bfloat16(train):
    result = train("out", dtype="bfloat16")
    assert {value.dtype for value in _weights(result.folder).values()} == {torch.bfloat16}
    assert result.epoch_losses[-1] < result.epoch_losses[0]


def test_short_memory_halves_the_batch_once_said(train, monkeypatch, capsys):
    real = training.sample_losses

    def small_memory(model, samples, indices, device):
        if len(indices) > 2:
            raise torch.OutOfMemoryError("tried to allocate")
        return real(model, samples, indices, device)

    monkeypatch.setattr(training, "sample_losses", small_memory)
    result = train("out", batch_size=8)
    assert result.steps == 6
    assert [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line] == [
        "out of memory: going on with 4 samples a forward pass, same result",
        "out of memory: going on with 2 samples a forward pass, same result",
    ]
    record = yaml.safe_load((result.folder / "run.yaml").read_text())
    assert record["result"]["batch_size_that_fitted"] == 2


def test_no_memory_for_one_sample(train, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training, "sample_losses", no_memory)
    with pytest.raises(OutOfMemoryError, match="a batch of 1 sample of .* tokens; what may fit"):
        train("out")


def test_other_faults_are_not_taken_for_short_memory(train, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(training, "sample_losses", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train("out")


def test_weights_that_are_not_finite_are_named(train):
    base = train("base")
    weights = _weights(base.folder)
    weights["transformer.ln_f.weight"][3] = float("nan")
    save_file(weights, base.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"#\d+: loss is not finite at step 1; transformer.ln_f.weight holds NaN"):
        train("out", model=str(base.folder), vocab_size=None)


def test_a_loss_that_is_not_finite_names_the_sample(train, monkeypatch):
    real = training.sample_losses
    monkeypatch.setattr(training, "sample_losses", lambda *given: real(*given) * float("inf"))
    with pytest.raises(NumericsError, match=r"rows.jsonl#\d+: loss is not finite at step 1; lower --lr$"):
        train("out")


def test_a_gradient_that_is_not_finite_names_the_tensor(train, monkeypatch):
    real = training.sample_losses

    def poisoned(model, samples, indices, device):
        model.transformer.h[0].mlp.c_fc.bias.register_hook(lambda gradient: gradient * float("inf"))
        return real(model, samples, indices, device)

    monkeypatch.setattr(training, "sample_losses", poisoned)
    with pytest.raises(NumericsError, match=r"transformer.h.0.mlp.c_fc.bias: gradient is not finite at step 1"):
        train("out")


def test_rows_longer_than_the_model_has_positions(train):
    with pytest.raises(DataError, match="the model has 64 positions"):
        train("out", rows=[{"question": "q", "answer": "zqx" * 40}], vocab_size=259)


def test_token_ids_that_the_model_does_not_have(train):
    base = train("base")
    with pytest.raises(DataError, match="--data: sample rows#0 has token id 300, the model's vocabulary ends at 2"):
        train(
            "out",
            rows=[{"input_ids": [5, 300], "labels": [-100, 300]}],
            model=str(base.folder),
            vocab_size=None,
            tokenizer=_larger_tokenizer(base.folder),
        )


def _larger_tokenizer(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<{number}>" for number in range(40)])
    tokenizer.save_pretrained(folder.parent / "larger")
    return str(folder.parent / "larger")


def test_skipped_rows_are_listed_in_part_and_recorded_in_full(data, architecture, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text(Path(data).read_text(encoding="utf-8") + '{"question": "Who?"}\n' * 12, encoding="utf-8")
    argv = f"--data {path} --skip-bad-rows --architecture {architecture} --vocab-size 300 --max-steps 1 --device cpu"
    assert main([*argv.split(), "--out", str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    skipped = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text(encoding="utf-8"))["skipped_rows"]
    assert [line.partition(": ")[0] for line in skipped] == [f"{path}, line {number}" for number in range(12, 24)]
    assert told[:-1] == [f"warning: skipped {line}" for line in skipped[:10]]
    assert told[-1].startswith("warning: --data: 12 of 23 rows skipped; the first 10 are listed here")


def test_an_existing_folder_is_only_replaced_on_request(train, tmp_path):
    first = train("out")
    with pytest.raises(RunFolderError, match="out exists; give --overwrite"):
        train("out")
    second = train("out", seed=3, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_overwrite_never_deletes_what_is_no_run(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        train("out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_run_replays_from_its_record(train, tmp_path, capsys):
    first = train("first", overwrite=True)
    assert main(["--config", str(first.folder / "run.yaml"), "--out", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (first.folder / "model.safetensors").read_bytes()
    out, err = capsys.readouterr()
    assert out.startswith("loss ")
    assert str(tmp_path / "second") in out
    assert "11 samples" in err
    assert "step 9/9" in err
    # A replay repeats the training, not the leave to overwrite that the first run was given.
    assert main(["--config", str(first.folder / "run.yaml")]) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{data}", "--model", "./nowhere"], "no such folder"),
        (["--data", "{data}", "--architecture", "vast"], "neither tiny nor small"),
        (["--data", "{data}", "--architecture", "tiny", "--device", "cuda:97"], "--device cuda:97"),
        (["--data", "{data}", "--architecture", "tiny", "--vocab-size", "9"], "--vocab-size 9"),
    ],
)
def test_mistakes_get_one_line(argv, said, data, tmp_path, capsys):
    argv = [data if word == "{data}" else word for word in argv]
    if not {"--model", "--architecture"} & set(argv):
        argv += ["--architecture", "tiny"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fillm finetune: ")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_logged_by_the_libraries(train, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        train("out")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal_lines_elsewhere(monkeypatch, capsys):
    with TrainingProgress(steps=2, done=0) as plain:
        plain.advance(1, 1, 4, 2.5)
        plain.advance(2, 1, 4, 1.25)
        plain.message("said once")
    assert capsys.readouterr().err.splitlines()[0].startswith("epoch 1  step 2/2  loss 1.2500")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with TrainingProgress(steps=2, done=0) as bar:
        bar.advance(1, 1, 4, 2.5)
        bar.message("said once")
    err = capsys.readouterr().err
    assert "said once" in err
    assert "1/2 steps" in err
    with TrainingProgress(steps=2, done=0, shown=False) as silent:
        silent.advance(2, 1, 4, 2.5)
    assert capsys.readouterr().err == ""
