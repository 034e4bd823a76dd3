"""`--dry-run` against the run that it describes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

import fillm.rank.command as command
from fillm.rank.__main__ import main
from tests.rank.conftest import question_row, word_tokenizer, write_rows


def planned_passes(out):
    """{name: (samples, tokens, batches)} from the lines of a dry run."""
    found = re.findall(r"^(\w+) pass +(\d+) samples, ([\d,]+) tokens, (\d+) batches$", out, re.MULTILINE)
    return {
        name: (int(samples), int(tokens.replace(",", "")), int(batches)) for name, samples, tokens, batches in found
    }


@pytest.mark.parametrize(
    "further",
    [
        [],
        ["--objective", "trade-off"],
        ["--method", "saliency"],
        ["--layout", "packed", "--tokens-per-batch", "100"],
        ["--num-retain", "5", "--max-length", "12", "--include", "mlp"],
        ["--compression", "tensorsketch", "--sketch-dim", "64"],
    ],
)
@pytest.mark.usefixtures("nothing_drawn")
def test_passes_are_those_of_the_run(arguments, capsys, tmp_path, further):
    assert main(arguments(*further, "--dry-run")) == 0
    planned = planned_passes(capsys.readouterr().out)
    assert main(arguments(*further)) == 0
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    done = {one["pass"]: (one["samples"], one["tokens"], one["batches"]) for one in record["passes"]}
    done.pop("follow-up", None)  # comes on top where the bracket does not certify; the dry run says so
    assert planned == done and set(planned) >= {"forget"}


def test_samples_that_the_run_would_refuse_are_refused(arguments, fails, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2 " * 80}])
    assert "rows.jsonl#0 has 160 tokens, the model has 128 positions" in fails(arguments("--dry-run", forget=path))


def test_tensors_in_scope_are_those_of_the_run(arguments, capsys, tmp_path):
    assert main(arguments("--include", "attn", "--dry-run")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tensors in scope")]
    assert re.search(r"  8 \(6,144 parameters\)$", line)


def test_nothing_is_written_and_no_model_loaded(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *given, **options: pytest.fail("a model was loaded"))
    assert main(arguments("--dry-run")) == 0
    out, err = capsys.readouterr()
    assert list(tmp_path.iterdir()) == [] and err == ""
    for line in ("  weights", "  mean forget gradient v", "  activations", "  expected peak", "  total", "time"):
        assert any(found.startswith(line) for found in out.splitlines()), line


def test_a_finished_run_folder_is_left_alone(arguments, capsys, tmp_path):
    assert main(arguments(method="random")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main(arguments("--dry-run")) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_mistakes_are_named_as_in_the_run(arguments, fails, tmp_path):
    assert "no such file" in fails(arguments("--dry-run", forget="no/such.jsonl"))
    assert "nothing*" in fails(arguments("--dry-run", "--include", "nothing*"))
    path = write_rows(tmp_path / "rows.jsonl", [question_row(1), {"question": "w1"}])
    assert "line 2: no field 'answer'" in fails(arguments("--dry-run", forget=path))


@pytest.mark.parametrize("asked", [("--curvature", "woodbury"), ("--method", "first-order")])
@pytest.mark.parametrize("kibibytes", [1, 60, 100, 140, 180])
@pytest.mark.usefixtures("nothing_drawn")
def test_a_memory_too_small_for_one_tensor_is_refused_as_in_the_run(arguments, capsys, asked, kibibytes):
    lines = []
    for further in ((), ("--dry-run",)):
        assert main(arguments(*asked, "--memory", f"{kibibytes}KiB", *further)) in (0, 2)
        lines.append([line for line in capsys.readouterr().err.splitlines() if "the gradients of" in line])
    assert lines[0] == lines[1]
    assert bool(lines[0]) == (kibibytes < 100)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_auto_asks_for_memory_where_the_true_inverse_takes_more_numbers(arguments, fails, dry, monkeypatch):
    line = fails(arguments("--compression", "auto", "--curvature", "woodbury", "--memory", "20KiB", *dry))
    assert re.search(r"--memory 20KiB: sketches of 20 samples .* give --memory 1MiB or more, fewer samples", line)
    assert "--sketch-dim" not in line


def test_the_default_model_is_not_made_for_it(arguments, fails, tmp_path, monkeypatch):
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "cache"))
    assert "the embedded default model is not made yet" in fails(arguments("--dry-run", model=None))


@pytest.mark.slow
@pytest.mark.parametrize("further", [[], ["--save-update"]])
def test_expected_memory_is_within_a_quarter_of_the_peak(tmp_path, further):
    """A model of 25 million weights, which outweighs the interpreter and its libraries."""
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=7, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert 22e6 < sum(p.numel() for p in model.parameters()) < 30e6
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    forget = write_rows(tmp_path / "forget.jsonl", [question_row(n, 60) for n in range(8)])
    retain = write_rows(tmp_path / "retain.jsonl", [question_row(n, 60) for n in range(20, 36)])
    argv = ["--model", str(tmp_path / "model"), "--forget", forget, "--retain", retain, "--device", "cpu", *further]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])

    def run(*more):
        done = subprocess.run(
            [sys.executable, "-m", "fillm.rank", *argv, *more],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("--dry-run")
    number, unit = re.search(r"^  expected peak +([\d.,]+) (\w+)$", out, re.MULTILINE).groups()
    expected = float(number.replace(",", "")) * {"MiB": 2**20, "GiB": 2**30}[unit]
    run("--out", str(tmp_path / "run"))
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    measured = max(one["peak_memory_bytes"] for one in record["passes"])
    print(f"expected {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB\n{out}")
    assert expected == pytest.approx(measured, rel=0.25)
