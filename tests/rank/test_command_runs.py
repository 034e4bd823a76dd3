"""Whole runs of the command: what the folder holds, replays, interruptions."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fillm_kernels
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import fillm
from fillm.__main__ import main as fillm_main
from fillm.rank.__main__ import main
from fillm.rank.config import RankConfig
from fillm.rank.passes import Passes

COLUMNS = [
    "rank", "name", "kind", "layer", "numel", "score", "score_low", "score_high", "damping", "mean_retain_sq_norm",
    "forget_norm", "predicted_forget_gain", "retain_damage", "note",
]  # fmt: skip
FILES = ["heatmap.png", "ranking.csv", "ranking.parquet", "run.yaml", "samples.parquet", "tensors.parquet"]
RESULTS = ["ranking.csv", "ranking.parquet", "samples.parquet", "update.safetensors"]

PATH = ["--method", "path", "--granularity", "element", "--path-rise", "0.1", "--path-points", "2"]
ROUNDS = [*PATH, "--path-rounds", "2"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def record_of(folder):
    return yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))


def assert_same_bytes(one, other):
    assert names(one) == names(other)
    for name in set(RESULTS) & set(names(one)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_the_folder_holds_what_is_documented(arguments, tmp_path, model_folder, capsys):
    assert main(arguments()) == 0
    folder = tmp_path / "run"
    assert names(folder) == FILES and names(tmp_path) == ["run"]
    table = pq.read_table(folder / "ranking.parquet")
    assert table.column_names == COLUMNS
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert dict(zip(table["name"].to_pylist(), table["numel"].to_pylist(), strict=True)) == sizes
    assert table["rank"].to_pylist() == list(range(1, len(sizes) + 1))
    score = table["score"].to_pylist()
    assert score == sorted(score, reverse=True) and score[-1] > 0
    for row in table.to_pylist():
        assert row["score_low"] <= row["score"] <= row["score_high"] <= row["score_low"] * (1 + 1.001e-3)
        # (1) of the method: the damping is a tenth of the mean squared gradient entry.
        assert row["damping"] == pytest.approx(0.1 * row["mean_retain_sq_norm"] / row["numel"])
    with (folder / "ranking.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == score and list(rows[0]) == COLUMNS
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"top {min(20, len(sizes))} of {len(sizes)}: soir")
    assert out.splitlines()[-1] == f"run folder: {folder}"
    assert table["name"][0].as_py() in out


def test_the_record_says_what_was_done(arguments, tmp_path, model_folder):
    assert main(arguments()) == 0
    record = record_of(tmp_path / "run")
    assert set(record["settings"]) == set(RankConfig.__dataclass_fields__)
    assert record["settings"]["model"] == model_folder and record["settings"]["tokens_per_batch"] == 48
    assert record["versions"]["torch"] == str(torch.__version__) and record["device"] == "cpu"
    assert record["threads"] == torch.get_num_threads() and record["skipped_rows"] == []
    assert set(record["backends"]) == set(fillm_kernels.backends())
    assert {name: len(value) for name, value in record["fingerprints"].items()} == dict.fromkeys(
        ("model", "forget", "retain"), 64
    )
    samples = pq.read_table(tmp_path / "run" / "samples.parquet").to_pylist()
    for one, count in zip(record["passes"], (6, 14), strict=False):
        tokens = sum(row["tokens"] for row in samples if row["set"] == one["pass"])
        assert (one["samples"], one["tokens"]) == (count, tokens) and one["batches"] > 1
        assert one["seconds"] >= 0 and one["peak_memory_bytes"] > 1 << 20


def test_sample_losses_are_the_models_own(arguments, tmp_path, model_folder, forget_file, retain_file):
    assert main(arguments()) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    expected = {}
    for path in (forget_file, retain_file):
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
            answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                expected[f"{path}#{number}"] = (len(prompt + answer), float(model(input_ids=ids, labels=labels).loss))
    found = pq.read_table(tmp_path / "run" / "samples.parquet").to_pylist()
    assert {row["id"]: row["tokens"] for row in found} == {name: tokens for name, (tokens, _) in expected.items()}
    for row in found:
        assert row["loss"] == pytest.approx(expected[row["id"]][1], rel=1e-5), row["id"]


@pytest.mark.parametrize("further", [[], ["--save-update", "--objective", "retain"], ["--granularity", "row"], ROUNDS])
def test_a_record_replays_to_the_same_bytes(arguments, tmp_path, further):
    first = tmp_path / "run"
    assert main(arguments(*further)) == 0
    assert main(["--config", str(first / "run.yaml"), "--out", str(tmp_path / "other")]) == 0
    assert_same_bytes(first, tmp_path / "other")
    assert ("update.safetensors" in names(first)) == bool(further)


def test_a_replay_never_inherits_leave_to_overwrite(arguments, tmp_path, capsys):
    argv = arguments(method="random")
    assert main([*argv, "--overwrite"]) == 0
    record = (tmp_path / "run" / "run.yaml").read_bytes()
    assert main(["--config", str(tmp_path / "run" / "run.yaml")]) == 2
    assert "run exists; give --overwrite or another --out" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.yaml").read_bytes() == record
    assert main(["--config", str(tmp_path / "run" / "run.yaml"), "--overwrite"]) == 0


def test_printed_settings_are_read_back(arguments, tmp_path, capsys):
    argv = arguments("--print_config", "--tolerance", "1e-7", "--save-update", "--exclude", "*norm*")
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["tolerance"] == 1e-7 and list(yaml.safe_load(printed)) == list(
        RankConfig.__dataclass_fields__
    )
    (tmp_path / "settings.yaml").write_text(printed, encoding="utf-8")
    assert main(["--config", str(tmp_path / "settings.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed and names(tmp_path) == ["settings.yaml"]


def test_python_ranks_as_the_command_does(arguments, tmp_path, model_folder, forget_file, retain_file):
    assert main(arguments()) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    ranking = fillm.rank_parameters(model, tokenizer, forget_file, retain_file, tokens_per_batch=48)
    assert ranking.table.equals(fillm.Ranking.load(tmp_path / "run").table)


def subprocess_environment():
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_both_ways_to_call_it_and_plain_lines_where_there_is_no_terminal(arguments, tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "fillm.rank", *arguments(out=str(tmp_path / "module"))],
        capture_output=True, text=True, env=subprocess_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert fillm_main(["rank", *arguments()]) == 0
    table = capsys.readouterr().out.splitlines()[:-1]
    assert_same_bytes(tmp_path / "module", tmp_path / "run")
    assert done.stdout.splitlines()[:-1] == table
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text and "\r" not in text
    assert [line.split(":")[0] for line in done.stderr.splitlines()][:2] == ["forget pass", "forget pass"]


def test_fillm_itself(capsys):
    assert fillm_main([]) == 0 and "rank" in capsys.readouterr().out
    assert fillm_main(["rnak"]) == 2
    assert "no command is called 'rnak'" in capsys.readouterr().err
    assert fillm_main(["rank", "--method", "magic"]) == 2
    assert capsys.readouterr().err.startswith("fillm rank: --method: 'magic'")


KINDS = {
    "certified": [],
    "follow-up": ["--tolerance", "1e-9"],
    "update": ["--save-update"],
    "retain": ["--objective", "retain", "--save-update"],
    "sum": ["--method", "soir-sum"],
    "path": ROUNDS,
    "groups": ["--groups", "3", "--save-update"],
}


@pytest.fixture
def stopped_after(monkeypatch):
    """Runs the command and sends its process a SIGTERM in the n-th batch of all passes; also counts batches."""

    def run(argv, number):
        seen, real = [], Passes._batch

        def counting(self, *given):
            seen.append(given)
            if len(seen) == number:
                signal.raise_signal(signal.SIGTERM)
            return real(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Passes, "_batch", counting)
            return main(argv), len(seen)

    return run


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        *(pytest.param(kind, "0.000001", marks=[pytest.mark.slow] * (kind in ("path", "groups"))) for kind in KINDS),
        ("retain", "1000"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(arguments, tmp_path, capsys, stopped_after, kind, seconds):
    """Stopped in the first and last batch of the run and around the ends of its passes, with states and without."""
    further = [*KINDS[kind], "--checkpoint-seconds", seconds]
    whole = arguments(*KINDS[kind], out=str(tmp_path / "whole"))
    code, batches = stopped_after(whole, -1)
    assert code == 0 and batches >= 6
    for number in sorted({1, batches // 2, batches // 2 + 1, batches}):
        out = tmp_path / f"stopped-{number}"
        argv = arguments(*further, out=str(out))
        capsys.readouterr()
        assert stopped_after(argv, number) == (3, number)
        assert "stopped by SIGTERM" in capsys.readouterr().err.splitlines()[-1] and not out.exists()
        code, rest = stopped_after([*argv, "--resume"], -1)
        assert code == 0 and rest < batches
        assert_same_bytes(tmp_path / "whole", out)
        passes = [[p["pass"], p["samples"], p["tokens"], p["batches"]] for p in record_of(out)["passes"]]
        assert passes == [
            [p["pass"], p["samples"], p["tokens"], p["batches"]] for p in record_of(tmp_path / "whole")["passes"]
        ]


@pytest.mark.usefixtures("nothing_drawn")
def test_a_run_that_is_interrupted_again_and_again(arguments, tmp_path, stopped_after):
    whole = arguments("--save-update", out=str(tmp_path / "whole"))
    assert main(whole) == 0
    argv = arguments("--save-update", "--resume", "--checkpoint-seconds", "0.000001")
    for _ in range(50):
        code, _ = stopped_after(argv, 2)
        if code == 0:
            break
        assert code == 3
    assert code == 0
    assert_same_bytes(tmp_path / "whole", tmp_path / "run")


def test_python_api_outside_the_main_thread(model_folder, forget_file, retain_file):
    """Signal handlers can only be set in the main thread; elsewhere a ranking has to do without."""
    import threading

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(fillm.rank_parameters(model, tokenizer, forget_file, retain_file))
    )
    thread.start()
    thread.join()
    assert len(found) == 1 and len(found[0]) == len(list(model.named_parameters()))


_SLOWED = """
import sys, time
from fillm.rank.passes import Passes
real, marker = Passes._batch, sys.argv.pop(1)
def waiting(self, *given):
    out = real(self, *given)
    saved = self.folder.load_state()
    if saved is not None and f"{saved[0]}-{saved[1]}" == marker:
        print("here", flush=True)
        time.sleep(120)
    return out
Passes._batch = waiting
from fillm.rank.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("moment", ["forget-1", pytest.param("retain-2", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_with_the_same_bytes(arguments, tmp_path, moment):
    """SIGKILL right after a state was saved and another batch done: the process has no chance to tidy up."""
    assert main(arguments("--save-update", out=str(tmp_path / "whole"))) == 0
    argv = arguments("--save-update", "--checkpoint-seconds", "0.000001")
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOWED, moment, *argv],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=subprocess_environment(),
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "here\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run").exists()
    assert main(argv) == 2
    assert main([*argv, "--resume"]) == 0
    assert_same_bytes(tmp_path / "whole", tmp_path / "run")
    assert names(tmp_path) == ["run", "whole"]


def test_updates_are_of_every_tensor_and_their_norms_the_scores(arguments, tmp_path):
    assert main(arguments("--save-update")) == 0
    ranking = fillm.Ranking.load(tmp_path / "run")
    updates = load_file(tmp_path / "run" / "update.safetensors")
    assert set(updates) == set(ranking.scores)
    for name, score in ranking.scores.items():
        assert float(updates[name].double().norm()) == pytest.approx(score, rel=1e-6)
