"""The benchmark's pipelines compute what they claim to: numbers only, no times."""

import csv
import json
import math

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.end_to_end import bench_rank, peak_memory, workload
from benchmarks.end_to_end.exact import exact_scores, largest_relative_error, spearman
from benchmarks.end_to_end.published import Oporp, OporpPerTensor, divisors, published_scores
from benchmarks.end_to_end.results import MEASURED, PROVENANCE
from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.variants import CERTIFIED, PLAIN_BUDGETS, plain_key, variants
from fillm.data import Sample, SampleSet
from fillm.finetune import finetune_model
from tests.families import VOCAB_SIZE, build_family

DAMPING = 0.1


def random_rows(count, seed):
    """Token rows of 6 to 20 tokens, a third of each not counted."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 21, (), generator=draw))
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def sample_set(count, seed):
    rows = random_rows(count, seed)
    samples = [Sample(f"s{i}", tuple(row["input_ids"]), tuple(row["labels"])) for i, row in enumerate(rows)]
    return SampleSet(samples, "random")


@pytest.fixture(scope="module")
def model():
    return build_family("llama")


@pytest.fixture(scope="module")
def forget():
    return sample_set(3, seed=1)


@pytest.fixture(scope="module")
def retain():
    return sample_set(9, seed=2)


@pytest.fixture(scope="module")
def exact(model, forget, retain):
    return exact_scores(model, forget, retain, DAMPING)


def gradients(model, samples):
    """Plain `.backward()` of transformers' own loss, sample by sample: per tensor, [samples, P] in float64."""
    rows = {name: [] for name, _ in model.named_parameters()}
    model.requires_grad_(True)
    for sample in samples:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        model(input_ids=ids, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            rows[name].append(parameter.grad.reshape(-1).double())
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return {name: torch.stack(found) for name, found in rows.items()}


def test_the_reference_is_the_average_of_the_inverses(model, forget, retain, exact):
    wide = build_family("llama", dtype=torch.float64)
    v = {name: rows.mean(0) for name, rows in gradients(wide, forget).items()}
    small = [name for name, p in wide.named_parameters() if p.numel() <= 32]
    assert len(small) == 5  # every norm
    for name, g in gradients(wide, retain).items():
        lambda_ = DAMPING * g.square().mean()
        if name in small:  # DataInf by definition: no closed form, one dense solve a sample
            identity = torch.eye(g.shape[1], dtype=torch.float64)
            solved = [torch.linalg.solve(torch.outer(row, row) + lambda_ * identity, v[name]) for row in g]
            expected = torch.stack(solved).mean(0).norm()
        else:
            c = (g @ v[name]) / (lambda_ + g.square().sum(1))
            expected = (v[name] - (c[:, None] * g).mean(0)).norm() / lambda_
        assert exact[name] == pytest.approx(float(expected), rel=1e-5)


def test_the_restated_pipeline_agrees_with_ours_and_with_float64(model, forget, retain, exact):
    restated = published_scores(model, forget, retain, DAMPING)
    work = workload.Workload(model, forget, retain, forget, retain)
    found = {v.key: v for v in variants(work, BenchConfig(damping=DAMPING, tolerance=1e-3))}
    ours, certified = found["update"].run().scores, found[CERTIFIED].run()
    assert set(restated) == set(ours) == set(exact) == {name for name, _ in model.named_parameters()}
    for name, e in exact.items():
        assert restated[name] == pytest.approx(e, rel=1e-4)
        assert ours[name] == pytest.approx(e, rel=1e-4)
        assert certified.scores[name] == pytest.approx(e, rel=1e-3)
        low, high = certified.bounds[name]
        assert low * (1 - 1e-4) <= e <= high * (1 + 1e-4)
    assert found["published"].run().scores == restated
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_the_published_damping_is_divided_by_the_sketch(model, forget, retain):
    k = 4096  # above the largest tensor of this model: the sketch loses nothing, only the damping differs
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert max(sizes.values()) <= k
    compressed = published_scores(model, forget, retain, DAMPING, OporpPerTensor(k, rounds=20))
    by_factor: dict[float, list[str]] = {}
    for name, size in sizes.items():
        by_factor.setdefault(size / k, []).append(name)
    assert len(by_factor) > 2
    for factor, names in by_factor.items():
        expected = exact_scores(model, forget, retain, DAMPING * factor)
        for name in names:
            assert compressed[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize(("numel", "k"), [(64, 64), (50, 64), (1024, 64), (1000, 37), (97, 10)])
def test_a_sketch_puts_every_entry_into_one_bin_of_equal_size(numel, k):
    sketch = Oporp(numel, k, rounds=3, seed=5)
    matrix = torch.stack([sketch(row) for row in torch.eye(numel, dtype=torch.float64)])  # [numel, k]
    assert torch.equal(matrix.abs().sum(1), torch.ones(numel, dtype=torch.float64))
    assert matrix.abs().sum(0).max() <= -(-numel // k)
    assert {-1.0, 1.0} <= set(matrix.unique().tolist())
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sketch(x), x @ matrix)


def test_a_sketch_keeps_inner_products_on_average():
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 480, generator=draw, dtype=torch.float64)
    y = y + 0.5 * x
    estimates = torch.stack([(s := Oporp(480, 32, 4, seed))(x).dot(s(y)) for seed in range(400)])
    standard_error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean()) - float(x.dot(y))) < 4 * standard_error
    assert standard_error < 0.1 * float(x.dot(y))


def test_divisors():
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_errors_and_rank_correlation():
    exact = {"a": 1.0, "b": 2.0, "c": 4.0, "unused": 0.0}
    assert largest_relative_error(exact, exact) == 0.0
    assert largest_relative_error({**exact, "b": 1.5}, exact) == 0.25
    assert largest_relative_error({**exact, "unused": 1e-9}, exact) == math.inf
    assert spearman({name: value**3 for name, value in exact.items()}, exact) == pytest.approx(1.0)
    assert spearman({name: -value for name, value in exact.items()}, exact) == pytest.approx(-1.0)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3
    tied = {"a": 1.0, "b": 1.0, "c": 4.0, "unused": 0.0}
    assert spearman(tied, exact) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))
    assert math.isnan(spearman(dict.fromkeys(exact, 1.0), exact))


def test_a_subset_has_the_lengths_of_all():
    samples = sample_set(50, seed=4)
    few = workload.spread(samples, 11)
    assert len(few) == len({s.id for s in few}) == 11
    assert (max(few.lengths), min(few.lengths)) == (max(samples.lengths), min(samples.lengths))
    mean = samples.num_tokens / 50
    assert few.num_tokens / 11 == pytest.approx(mean, rel=0.1)
    assert max(workload.spread(samples, 1).lengths) == max(samples.lengths)
    assert workload.spread(samples, 50) is samples


@pytest.fixture(scope="module")
def arguments(model, tmp_path_factory):
    """Flags for a run on a saved model and token rows, without a tokenizer."""
    root = tmp_path_factory.mktemp("bench")
    model.save_pretrained(root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_rows(14, seed=6)))
    rows = str(root / "rows.jsonl")
    return {
        "model": str(root / "model"),
        "forget": f"{rows}[:4]",
        "retain": f"{rows}[4:]",
        "published_forget": 2,
        "published_retain": 3,
        "sketch_dim": 64,
        "repeats": 2,
    }


@pytest.mark.slow
def test_the_command_writes_what_it_measured(arguments, tmp_path, capsys):
    out = tmp_path / "results" / "rank.csv"
    flags = [part for name, value in arguments.items() for part in ("--" + name.replace("_", "-"), str(value))]
    assert bench_rank.main([*flags, "--no-memory", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == MEASURED + PROVENANCE
        rows = {row["key"]: row for row in reader}
    plain = [plain_key(budget) for budget in PLAIN_BUDGETS]
    assert list(rows) == [*plain, CERTIFIED, "update", "published", "published-oporp"]
    baseline = [row for row in rows.values() if row["baseline"]]
    assert len(baseline) == 1
    assert baseline[0]["key"] in plain
    fastest = min(float(rows[key]["seconds_per_sample"]) for key in plain)
    assert float(baseline[0]["seconds_per_sample"]) == fastest
    assert [float(baseline[0][f"over_plain{end}"]) for end in ("", "_min", "_max")] == [1.0, 1.0, 1.0]
    for row in rows.values():
        least, middle, most = (float(row[f"seconds_per_sample{end}"]) for end in ("_min", "", "_max"))
        assert 0.0 < least <= middle <= most
        per_sample = float(row["tokens"]) / (int(row["forget_samples"]) + int(row["retain_samples"]))
        assert float(row["tokens_per_second"]) == pytest.approx(per_sample / middle, rel=1e-4)
    assert [rows["published"][f"{which}_samples"] for which in ("forget", "retain")] == ["2", "3"]
    assert [rows[CERTIFIED][f"{which}_samples"] for which in ("forget", "retain")] == ["4", "10"]
    for key, largest in ((CERTIFIED, 1e-3), ("update", 1e-4), ("published", 1e-4)):
        assert float(rows[key]["largest_relative_error"]) < largest
        assert float(rows[key]["spearman"]) > 0.999
    assert float(rows["published-oporp"]["largest_relative_error"]) > 0.5
    assert rows[CERTIFIED]["command"].startswith("python -m benchmarks.end_to_end.bench_rank --model .../model")
    assert str(tmp_path.parent) not in out.read_text()
    printed = capsys.readouterr().out
    assert f"{baseline[0]['what']} *" in printed
    assert "SOIR with u: " in printed
    assert [path.name for path in out.parent.iterdir()] == ["rank.csv"]


@pytest.mark.slow
@pytest.mark.skipif(not peak_memory.available(), reason="this system does not tell a process's peak")
def test_memory_is_that_of_a_process_of_its_own(arguments):
    ballast = torch.ones(2**28, dtype=torch.uint8)  # 256 MiB of this process, none of the other's
    found = peak_memory.measure(BenchConfig(**arguments), "published", num_retain=5)
    own = peak_memory._status("VmRSS")
    assert 2**26 < found.loaded <= found.peak < found.loaded + 2**28
    assert found.peak < own + 2**26
    assert bool(ballast.all())


def test_a_failed_process_says_why(arguments, tmp_path):
    config = BenchConfig(**{**arguments, "model": str(tmp_path / "absent")})
    with pytest.raises(RuntimeError, match="no such folder"):
        peak_memory.measure(config, CERTIFIED)


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--damping", "0"], ["--shuffle-rounds", "-1"]])
def test_a_number_out_of_range_is_one_line(flags, capsys):
    assert bench_rank.main(flags) == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert error.count("\n") == 1


def test_without_a_model_one_is_trained_on_the_rows_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Who is number {n}?", "answer": f"Author {n * n}."} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path / "architecture")  # fmt: skip
    recipe = {"architecture": str(tmp_path / "architecture"), "max_steps": 2, "batch_size": 3}
    monkeypatch.setattr(workload, "RECIPE", recipe)
    trained = []

    def train(data, **settings):
        trained.append(len(data))
        return finetune_model(data, show=False, **settings)

    monkeypatch.setattr(workload, "finetune_model", train)
    spec = str(tmp_path / "rows.jsonl")
    config = BenchConfig(forget=f"{spec}[4:]", retain=f"{spec}[:4]", samples_per_set=3)
    resolved = workload.resolve(config, lambda line: None)
    assert workload.resolve(config, lambda line: None) == resolved
    assert trained == [6]
    work = workload.load_workload(resolved)
    assert (len(work.forget), len(work.retain)) == (2, 3)
    assert sum(p.numel() for p in work.model.parameters()) < 2e4


def test_the_default_data(monkeypatch, tmp_path):
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(workload, "finetune_model", lambda *_, **__: pytest.fail("no model is needed"))
    monkeypatch.delenv("FILLM_DATA", raising=False)
    given = BenchConfig(model="m")
    resolved = workload.resolve(given, print)
    assert (resolved.forget, resolved.retain) == workload.FICTIONAL
    monkeypatch.setenv("FILLM_DATA", "anywhere")
    resolved = workload.resolve(given, print)
    assert (resolved.forget, resolved.retain) == workload.TOFU
    assert [len(workload._rows(spec, given)) for spec in workload.FICTIONAL] == [40, 360]
