"""`fillm.rank_parameters`: what it takes, what it leaves alone, and what its result does not depend on."""

import copy
import signal

import datasets
import pytest
import torch

import fillm
from fillm import rank_parameters
from fillm.capture import Capture
from fillm.data import Sample, SampleSet
from fillm.errors import DataError, FillmError, NumericsError, UsageError
from tests.capture.reference import toy_samples
from tests.families import build_family, build_lora
from tests.rank.direct import FORGET, FORGET_ROWS, RETAIN, RETAIN_ROWS, Direct, direct_of, family, rows_of

RTOL = 1e-4


def ranked(model, **settings):
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, **settings)


def assert_same(one, other):
    assert one.table.equals(other.table)
    assert (one.updates is None) == (other.updates is None)
    if one.updates is not None:
        assert set(one.updates) == set(other.updates)
        assert all(torch.equal(one.updates[name], other.updates[name]) for name in one.updates)


def test_rows_may_be_a_list_a_dataset_a_tuple_or_a_spec(tmp_path):
    model, _ = family("llama")
    expected = ranked(model)
    as_datasets = rank_parameters(
        model, None, datasets.Dataset.from_list(FORGET_ROWS), datasets.Dataset.from_list(RETAIN_ROWS)
    )
    assert_same(expected, as_datasets)
    assert_same(expected, rank_parameters(model, None, tuple(FORGET_ROWS), iter(RETAIN_ROWS)))
    for which, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS)):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{which}.parquet")
    specs = rank_parameters(model, None, str(tmp_path / "forget.parquet"), str(tmp_path / "retain.parquet[:]"))
    assert_same(expected, specs)
    assert specs.samples["id"][0].as_py() == f"{tmp_path / 'forget.parquet'}#0"
    part = rank_parameters(model, None, FORGET_ROWS, str(tmp_path / "retain.parquet[1:4]"))
    assert_same(part, rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS[1:4]))


def test_the_sample_table_names_every_sample_and_its_loss():
    model, _ = family("llama")
    table = ranked(model).samples.to_pylist()
    assert [row["id"] for row in table] == [f"rows#{i}" for i in range(4)] + [f"rows#{i}" for i in range(6)]
    assert [row["set"] for row in table] == ["forget"] * 4 + ["retain"] * 6
    assert [row["tokens"] for row in table] == [s.num_tokens for s in [*FORGET, *RETAIN]]
    twin = copy.deepcopy(model).double()
    for row, sample in zip(table, [*FORGET, *RETAIN], strict=True):
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            loss = twin(input_ids=ids, labels=torch.tensor([sample.labels])).loss
        assert row["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "row", "objective": "trade-off"}, {"method": "wagle"}, {"method": "path", "path_rise": 0.1}],
)
def test_the_model_is_returned_as_it_came(settings):
    model = build_family("opt")
    model.train()
    model.model.decoder.layers[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
        if index % 2 == 0:
            parameter.grad = torch.full_like(parameter, float(index))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    modes = {name: module.training for name, module in model.named_modules()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    ranked(model, **settings)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for index, (name, parameter) in enumerate(model.named_parameters()):
        assert torch.equal(parameter, weights[name]) and parameter.requires_grad == (index % 3 == 0), name
        assert (parameter.grad is not None) == (index % 2 == 0), name
        assert parameter.grad is None or bool((parameter.grad == index).all()), name


def test_the_model_is_returned_as_it_came_after_an_error():
    model = build_family("llama").train().requires_grad_(True)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"the loss of sample rows#\d is nan: .* holds NaN"):
        ranked(model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_dropout_is_off():
    model = build_family("gpt2")
    expected = ranked(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert_same(expected, ranked(model.train()))


@pytest.fixture
def handler():
    """Python's own handler of Ctrl-C, which a program started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_pythons_own_and_leaves_the_model_as_it_came(monkeypatch, handler):
    """There is no folder, so nothing to save and nothing that could be resumed."""
    model = build_family("llama").train().requires_grad_(True)
    real = Capture.run

    def interrupted(capture, batch, samples, observe):
        def signalled(*given):
            signal.raise_signal(signal.SIGINT)
            observe(*given)

        return real(capture, batch, samples, signalled)

    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            ranked(model)
    assert "--resume" not in str(caught.value) and signal.getsignal(signal.SIGINT) is handler
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert_same(ranked(model), ranked(build_family("llama")))


WRONG = [
    ({"granularity": "rows"}, "--granularity: 'rows' is none of tensor, row, head, element"),
    ({"method": "soirr"}, "--method: 'soirr' is none of soir"),
    ({"damping": 0.0}, "--damping must be above 0, not 0.0"),
    ({"damping": float("nan")}, "--damping must be above 0"),
    ({"damping": "much"}, "--damping: 'much' is not of type float"),
    ({"tolerance": -1.0}, "--tolerance must be above 0"),
    ({"tokens_per_batch": 0}, "--tokens-per-batch must be at least 1"),
    ({"num_retain": 0}, "--num-retain must be at least 1"),
    ({"num_forget": 2.5}, "--num-forget: 2.5 is not of type int"),
    ({"layout": "middle"}, "--layout: 'middle' is none of right, left, packed"),
    ({"objective": "both"}, "--objective: 'both' is none of"),
    ({"score": "mean-abs", "method": "saliency"}, "--score mean-abs has no effect: --method saliency has a score"),
    ({"similarity": 0.5}, "--similarity 0.5 has no effect: it is a choice of --method memflex, not of soir; leave it"),
    ({"magnitude": 0.1, "method": "wagle"}, "--magnitude 0.1 has no effect: it is a choice of --method memflex, not"),
    ({"mu": 0.1}, "--mu 0.1 has no effect: it is a choice of --method wagle, not of soir"),
    ({"base_model": torch.nn.Linear(1, 1)}, "--base-model given has no effect: .* parameter-shift, not of soir"),
    ({"damping": 0.2, "method": "saliency"}, "--damping 0.2 has no effect: .* --method soir and soir-sum"),
    ({"tolerance": 0.2, "method": "soir-sum"}, "--tolerance 0.2 has no effect: .* of --method soir, not of"),
    ({"score": "max"}, "--score: 'max' is none of l2, mean-abs"),
    ({"save_update": "yes"}, "--save-update: 'yes' is not of type bool"),
    ({"include": "*nothing*"}, "--include \\*nothing\\*: matches no tensor"),
    ({"exclude": "*"}, "--exclude \\*: leaves none of the 21 tensors"),
    ({"compression": "oporp", "method": "saliency"}, "--method saliency cannot be answered from sketches"),
    ({"groups": 0}, "--groups must be at least 1"),
    ({"offload": True, "method": "path"}, "--offload is not taken here: --method path reads"),
    ({"speed": 3}, "rank_parameters: no setting is called 'speed'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "line"), WRONG)
def test_a_wrong_setting_is_one_line_that_names_the_option(settings, line):
    with pytest.raises(UsageError, match=line) as caught:
        ranked(family("llama")[0], **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forget", "error", "line"),
    [
        ([], DataError, "holds no rows"),
        ([{"question": "Who?", "answer": "Me."}], UsageError, "tokenizer"),
        ([{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}], DataError, "row 1: .*no token that counts"),
        ([{"input_ids": [5, 97, 7], "labels": [-100, 97, 7]}], DataError, "--forget: sample rows#0 has token id 97"),
        ([{"input_ids": [5, 6]}], FillmError, "labels"),
        (
            [{"input_ids": [5] * 400, "labels": [-100] + [5] * 399}],
            DataError,
            "--forget: sample rows#0 has 400 tokens, the model has 128 positions; give --max-length 128 or less",
        ),
        (["text"], DataError, "row 1: expected an object"),
        (17, UsageError, "rows cannot be read from int"),
        ({"train": [1]}, UsageError, "several splits"),
    ],
)
def test_wrong_rows_are_one_line(forget, error, line):
    with pytest.raises(error, match=line) as caught:
        rank_parameters(family("llama")[0], None, forget, RETAIN_ROWS)
    assert "\n" not in str(caught.value)


def test_scope():
    model, direct = family("llama")
    everything = ranked(model, save_update=True)
    part = ranked(model, include="mlp,*q_proj*", exclude="*layers.0*,norm", save_update=True)
    wanted = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    wanted |= {"model.layers.1.self_attn.q_proj.weight"}
    assert set(part.names) == set(part.updates) == wanted
    for name in wanted:
        assert part.scores[name] == pytest.approx(everything.scores[name], rel=1e-5)
        assert part.scores[name] == pytest.approx(float(direct.u[name].norm()), rel=RTOL)


def test_part_of_the_retain_set_is_drawn_with_the_seed():
    model, direct = family("llama")
    first, again, other = (ranked(model, num_retain=3, num_forget=2, seed=seed, save_update=True) for seed in (1, 1, 5))
    assert_same(first, again)
    ids = [[row["id"] for row in r.samples.to_pylist() if row["set"] == "retain"] for r in (first, other)]
    assert len(ids[0]) == len(ids[1]) == 3 and ids[0] != ids[1]

    def chosen(which):
        kept = [row["id"] for row in first.samples.to_pylist() if row["set"] == which]
        return [int(name.removeprefix("rows#")) for name in kept]

    expected = Direct([direct.f[i] for i in chosen("forget")], [direct.g[i] for i in chosen("retain")])
    for name, score in first.scores.items():
        assert score == pytest.approx(float(expected.u[name].norm()), rel=RTOL), name


def test_more_samples_than_there_are():
    with pytest.raises(UsageError, match="--num-retain 99: retain has 6 samples; give 1 to 6"):
        ranked(family("llama")[0], num_retain=99)


def test_the_loss_can_be_summed_over_tokens():
    """A sample's gradient grows with its answer, which changes every weight of a mean over samples."""
    model, direct = family("llama")

    def scaled(gradients, samples):
        return [
            {name: one * sample.num_counted for name, one in gradient.items()}
            for gradient, sample in zip(gradients, samples, strict=True)
        ]

    expected = Direct(scaled(direct.f, FORGET), scaled(direct.g, RETAIN))
    summed, mean = ranked(model, loss_reduction="sum", save_update=True), ranked(model, save_update=True)
    for name, score in summed.scores.items():
        assert score == pytest.approx(float(expected.u[name].norm()), rel=RTOL), name
        assert abs(score / mean.scores[name] - 1) > 0.01, name


BATCHES = [{"tokens_per_batch": 1}, {"tokens_per_batch": 40}, {"layout": "left"}]
BATCHES += [{"layout": "packed"}, {"layout": "packed", "tokens_per_batch": 50}]


@pytest.mark.parametrize(
    ("name", "extra"),
    [("llama", {}), ("gpt2", {}), ("llama", {"save_update": True}), ("gpt2", {"granularity": "row"})],
    ids=["llama-certified", "gpt2-certified", "llama-u", "gpt2-row"],
)
def test_scores_do_not_depend_on_batches(name, extra):
    model, _ = family(name)
    expected = ranked(model, **extra)
    largest: dict[str, float] = {}
    for key, score in expected.scores.items():
        tensor = key if isinstance(key, str) else key[0]
        largest[tensor] = max(largest.get(tensor, 0.0), score)
    for settings in BATCHES:
        found = ranked(model, **extra, **settings)
        assert set(found.scores) == set(expected.scores)
        for key, score in found.scores.items():
            scale = largest[key if isinstance(key, str) else key[0]]
            assert abs(score - expected.scores[key]) <= 1e-5 * scale, (key, settings)
        if "save_update" in extra:
            for tensor, u in found.updates.items():
                gap = float((u - expected.updates[tensor]).norm())
                assert gap <= 1e-5 * float(expected.updates[tensor].norm()), (tensor, settings)


@pytest.mark.parametrize("order", [[5, 0, 3, 1, 4, 2], [2, 1, 0, 5, 4, 3]])
def test_scores_do_not_depend_on_the_order_of_the_rows(order):
    model, _ = family("llama")
    shuffled = rank_parameters(model, None, FORGET_ROWS[::-1], [RETAIN_ROWS[i] for i in order])
    for name, score in ranked(model).scores.items():
        assert shuffled.scores[name] == pytest.approx(score, rel=1e-5), name


@pytest.mark.parametrize(
    "settings",
    [{}, {"save_update": True}, {"granularity": "element", "objective": "retain"}, {"method": "memflex"},
     {"granularity": "head", "objective": "trade-off"},
     {"method": "path", "granularity": "element", "path_rise": 0.1}],
)  # fmt: skip
def test_the_same_call_twice_gives_the_same_bits(settings):
    model = build_family("mixtral")
    assert_same(ranked(model, **settings), ranked(model, **settings))


def test_a_tied_tensor_is_ranked_once_with_both_its_uses():
    model, direct = family("llama-tied")
    ranking = ranked(model, save_update=True)
    assert "lm_head.weight" not in ranking.scores and "model.embed_tokens.weight" in ranking.scores
    for name, score in ranking.scores.items():
        assert score == pytest.approx(float(direct.u[name].norm()), rel=RTOL), name
    by_its_other_name = ranked(model, include="lm_head.weight")
    assert by_its_other_name.names == ["model.embed_tokens.weight"]


def test_adapters_can_be_ranked_alone():
    model = build_lora("llama", ["q_proj", "down_proj"])
    direct = direct_of(model)
    ranking = ranked(model, include="*lora*", save_update=True)
    assert set(ranking.names) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {row["kind"] for row in ranking} == {"lora"}
    for name, score in ranking.scores.items():
        assert score == pytest.approx(float(direct.u[name].norm()), rel=RTOL), name


def test_updates_are_there_where_they_were_asked_for_or_needed():
    model, _ = family("llama")
    assert ranked(model).updates is None
    assert ranked(model, objective="retain").updates is None
    assert ranked(model, score="mean-abs").updates is None
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for settings in ({"save_update": True}, {"granularity": "row"}, {"method": "soir-sum", "save_update": True}):
        assert {name: u.shape for name, u in ranked(model, **settings).updates.items()} == shapes


@pytest.mark.parametrize("published", ["so-influence", "so-influence-sum", "param-deltas"])
def test_published_names_are_accepted(published):
    model, base = family("llama")[0], build_family("llama", seed=3)
    own = {"so-influence": "soir", "so-influence-sum": "soir-sum", "param-deltas": "parameter-shift"}[published]
    given = {"base_model": base} if own == "parameter-shift" else {}
    ranking = ranked(model, method=published, **given)
    assert ranking.method == own
    assert_same(ranking, ranked(model, method=own, **given))


def test_shared_rows_are_an_error_when_strict():
    model, _ = family("llama")
    with pytest.raises(DataError, match="forget and retain share 2 rows"):
        rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS + FORGET_ROWS[:2], strict=True)
    assert len(rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS + FORGET_ROWS[:2])) == 21


def test_bad_rows_can_be_skipped():
    model, _ = family("llama")
    bad = {"input_ids": [3, 4], "labels": [-100, -100]}
    with pytest.raises(DataError, match="row 3: .*--skip-bad-rows"):
        rank_parameters(model, None, FORGET_ROWS, [*RETAIN_ROWS[:2], bad, *RETAIN_ROWS[2:]])
    found = rank_parameters(model, None, FORGET_ROWS, [*RETAIN_ROWS[:2], bad, *RETAIN_ROWS[2:]], skip_bad_rows=True)
    assert found.record["skipped_rows"] == ["rows, row 3: field 'labels' has no token that counts"]
    for name, score in ranked(model).scores.items():
        assert found.scores[name] == pytest.approx(score, rel=1e-5), name


def test_one_sample_on_each_side():
    """One retain sample: `u` has the closed form of a single rank-one curvature."""
    model, direct = family("llama")
    ranking = rank_parameters(model, None, FORGET_ROWS[:1], RETAIN_ROWS[:1], save_update=True)
    expected = Direct(direct.f[:1], direct.g[:1])
    for name, score in ranking.scores.items():
        assert score == pytest.approx(float(expected.u[name].norm()), rel=RTOL), name


def test_samples_are_cut_to_the_longest_allowed():
    model, _ = family("llama")
    samples = toy_samples(5, seed=4, shortest=12, longest=20)
    cut = [Sample(s.id, s.input_ids[-9:], (-100, *s.labels[-8:])) for s in samples]
    short = rank_parameters(model, None, FORGET_ROWS, rows_of(SampleSet(cut, "cut")), max_length=9)
    found = rank_parameters(model, None, FORGET_ROWS, rows_of(samples), max_length=9)
    assert max(found.samples["tokens"].to_pylist()) == 9
    # Where the prompt could give way, what is left is the end of the sample.
    roomy = [i for i, s in enumerate(samples) if s.num_counted <= 8]
    tokens = found.samples.to_pylist()[4:], short.samples.to_pylist()[4:]
    assert roomy and all(tokens[0][i]["loss"] == pytest.approx(tokens[1][i]["loss"], rel=1e-5) for i in roomy)


def test_a_ranking_is_saved_and_read_again(tmp_path):
    ranking = ranked(family("llama")[0], granularity="head")
    loaded = fillm.Ranking.load(ranking.save(tmp_path / "run"))
    assert loaded.table.equals(ranking.table) and loaded.granularity == "head"
    assert all(torch.equal(loaded.updates[name], ranking.updates[name]) for name in ranking.updates)
