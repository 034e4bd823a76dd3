"""Peers beside fillm: each goes over every sample and computes what its row says; one that is missing says so."""

import csv
import dataclasses

import pytest
import torch

from benchmarks.end_to_end import bench_peers
from benchmarks.end_to_end.bench_peers import PeersConfig, check
from benchmarks.end_to_end.peers import opacus_samples, own, registry, rounds, vmapped
from benchmarks.end_to_end.peers.registry import FEW, PEERS, SOME, Peer
from benchmarks.end_to_end.peers.setting import Absent, Ready, Setting, imported
from benchmarks.end_to_end.workload import Workload
from fillm.data import Sample, SampleSet
from fillm.errors import UsageError
from tests.families import VOCAB_SIZE, build_family


def sample_set(count, seed):
    draw, samples = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(3, VOCAB_SIZE, (6 + 3 * number,), generator=draw).tolist()
        samples.append(Sample(f"{seed}#{number}", tuple(ids), (-100, -100, *ids[2:])))
    return SampleSet(samples, "random")


@pytest.fixture
def work():
    forget, retain = sample_set(2, 1), sample_set(5, 2)
    return Workload(build_family("llama").eval().requires_grad_(False), forget, retain, forget, retain)


@pytest.fixture
def setting(work, tmp_path):
    return Setting(work.model, work.forget, work.retain, tmp_path)


def gradients_one_by_one(setting):
    """By sample id, then tensor: float64 gradients of the mean loss written out, one sample a pass."""
    model, found = build_family("llama", dtype=torch.float64).requires_grad_(True), {}
    model.load_state_dict(setting.model.state_dict())
    for sample in setting.samples:
        chances = model(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
        counted = [t for t in range(1, len(sample.labels)) if sample.labels[t] != -100]
        loss = -sum(chances[t - 1, sample.labels[t]] for t in counted) / len(counted)
        names = [name for name, _ in model.named_parameters()]
        found[sample.id] = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    return found


def close(found, expected):
    """float32 forward and backward through two layers of sums of at most 97 terms: some 1e3 unit roundings."""
    return float((found.double() - expected).norm()) <= 1e3 * torch.finfo(torch.float32).eps * float(expected.norm())


def test_vmap_gives_the_gradient_of_every_sample(setting):
    expected, seen = gradients_one_by_one(setting), []
    samples = setting.samples
    for batch, by_name in zip(setting.batches(48), vmapped._batches(setting, 48), strict=True):
        for row, position in enumerate(batch.indices.tolist()):
            seen.append(position)
            for name, gradient in expected[samples[position].id].items():
                assert close(by_name[name][row], gradient), name
    assert sorted(seen) == list(range(len(samples))) and len(setting.batches(48)) > 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_norms_of_opacus_are_those_of_the_samples(setting):
    pytest.importorskip("opacus")
    expected, read = gradients_one_by_one(setting), []
    ready = opacus_samples.norms(setting, lambda norms: read.append(norms.detach().clone()))
    ready.run(48)
    order = [position for batch in setting.batches(48) for position in batch.indices.tolist()]
    for position, norm in zip(order, torch.cat(read), strict=True):
        whole = torch.cat([g.flatten() for g in expected[setting.samples[position].id].values()])
        assert close(norm, whole.norm())


def test_ours_rank_every_tensor_and_plain_leaves_no_gradient(setting, monkeypatch):
    ranked = []
    right = own.rank_sketched
    monkeypatch.setattr(own, "rank_sketched", lambda *given: ranked.append(right(*given)))
    for make in (own.plain, own.certified, own.with_update, own.sketched):
        ready = make(setting)
        ready.run(64)
        assert ready.covered == setting.parameters == sum(p.numel() for p in setting.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in setting.model.parameters())
    assert {row["name"] for row in ranked[0].rows} == {name for name, _ in setting.model.named_parameters()}


def scripted(key, make, **more):
    return Peer(key, key, "nothing", "no-such-package", make, **more)


def plain_peer():
    return dataclasses.replace(PEERS[0], budgets=(64,))


def test_a_peer_that_is_missing_or_breaks_is_a_row_with_its_reason(work, tmp_path):
    turns = []

    def breaks_later(setting):
        def run(tokens):
            turns.append(tokens)
            if len(turns) > 2:
                raise RuntimeError("out of\nluck")

        return Ready(run, 1)

    peers = [plain_peer(), scripted("gone", lambda s: imported("no_such_module")),
             scripted("late", breaks_later, budgets=(32,))]  # fmt: skip
    said = []
    entries = rounds.prepared(peers, work, 4, 2, tmp_path, said.append)
    rounds.measure(entries, 3, said.append)
    plain, gone, late = rounds.rows_of(entries, {"plain": 7})
    assert plain["rounds"] == 3 and plain["over_plain"] == 1.0 and plain["covered"] == 1.0 and plain["extra_bytes"] == 7
    assert gone["note"].startswith("not installed: No module named 'no_such_module'") and "rounds" not in gone
    assert late["note"] == "fails: RuntimeError: out of luck" and "seconds_per_sample" not in late
    assert turns == [32, 32, 32] and "gone: not installed" in said[1]


def test_a_fault_of_ours_is_not_a_row(work, tmp_path):
    def broken(setting):
        raise RuntimeError("ours")

    ours = dataclasses.replace(scripted("fillm", broken), package="")
    with pytest.raises(RuntimeError, match="ours"):
        rounds.prepared([plain_peer(), ours], work, 4, 2, tmp_path, lambda line: None)


def test_a_peer_takes_its_fastest_batches_and_its_own_part_of_the_samples(work, tmp_path, monkeypatch):
    costs, clock, given = {32: 3.0, 64: 1.0, 128: 2.0}, [0.0], []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])

    def make(setting):
        given.append(len(setting.samples))

        def run(tokens):
            clock[0] += costs[tokens]

        return Ready(run, 1)

    peers = [scripted("tuned", make, budgets=tuple(costs)), scripted("some", make, samples=SOME, budgets=(32,)),
             scripted("few", make, samples=FEW, budgets=(128,))]  # fmt: skip
    tuned, some, few = rounds.prepared(peers, work, 4, 2, tmp_path, lambda line: None)
    assert (tuned.tokens, some.tokens, few.tokens) == (64, 32, 128)
    assert (tuned.num_samples, some.num_samples, few.num_samples) == (7, 4, 2)
    assert given == [7, 7, 4, 2]  # the trial, then the peers themselves
    assert len({id(entry.setting.model) for entry in (tuned, some, few)}) == 3
    rounds.measure([tuned, few], 2, lambda line: None)
    assert tuned.seconds == [pytest.approx(1.0 / 7)] * 2 and few.seconds == [pytest.approx(2.0 / 2)] * 2


def test_what_is_asked_for_is_checked():
    assert [peer.key for peer in check(PeersConfig(only="trak, vmap"))] == ["plain", "vmap", "trak"]
    assert check(PeersConfig()) == list(PEERS) and len({peer.key for peer in registry.PEERS}) == len(PEERS)
    for wrong, said in (({"rounds": 0}, "--rounds 0"), ({"only": "opacsu"}, "--only opacsu: there are plain"),
                        ({"device": "tpu"}, "--device tpu"), ({"dtype": "int8"}, "--dtype int8")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            check(PeersConfig(**wrong))


def test_absence_names_what_is_lacking():
    with pytest.raises(Absent, match="not installed: No module named 'no_such_module'"):
        imported("no_such_module")


@pytest.mark.slow
def test_the_command_writes_its_rows_and_its_page(tmp_path, small_model, capsys):
    out, page = tmp_path / "peers.csv", tmp_path / "page.md"
    words = [
        "--model",
        str(small_model),
        "--forget",
        "fictional-small:forget05",
        "--retain",
        "fictional-small:retain95",
    ]
    words += ["--samples-per-set", "4", "--some", "4", "--rounds", "2", "--only", "fillm-certified,vmap,bergson-16"]
    assert bench_peers.main([*words, "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["plain", "fillm-certified", "bergson-16", "vmap"]
    for row in rows.values():
        assert row["note"] or float(row["over_plain_min"]) <= float(row["over_plain"]) <= float(row["over_plain_max"])
        assert row["command"].startswith("python -m benchmarks.end_to_end.bench_peers") and row["threads"]
    assert float(rows["vmap"]["extra_bytes"]) > 0
    page.write_text("# Page\n\n<!-- peers: begin -->\n\nold\n\n<!-- peers: end -->\n\nRest.\n", encoding="utf-8")
    assert bench_peers.main(["--out", str(out), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("# Page\n") and text.endswith("\n\nRest.\n") and "certified" in text
