"""The recording of the untouched model: right, resumable to the same bytes, and refused where it does not fit."""

import hashlib
import random

import pytest
import torch
from torch import nn

from fillm.data import Sample, SampleSet, collate
from fillm.errors import RunFolderError
from fillm.unlearn import reference
from fillm.unlearn.losses import LossOptions, make_loss
from fillm.unlearn.reference import Recorded, ReferenceCache
from tests.families import HIDDEN, VOCAB_SIZE, build_family
from tests.unlearn.table_model import TableModel

ORDER = [7, 0, 31, 16]


def make_samples(count=40, seed=0):
    """Samples of 2 to 21 tokens, one-token answers and answers of all but the first token among them."""
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        tokens = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(2, 21))]
        prompt = draw.randint(1, len(tokens) - 1)
        samples.append(Sample(f"rows#{number}", tuple(tokens), tuple([-100] * prompt + tokens[prompt:])))
    return SampleSet(samples, "rows")


SAMPLES = make_samples()


@pytest.fixture(scope="module")
def models():
    """Logits that are `head(inputs)`, with and without a bias; logits that are capped; a tied head."""
    return {name: build_family(name) for name in ("llama", "phi", "gemma2", "gpt2")}


def make(folder, model, what="distributions", samples=SAMPLES, **options):
    layer = 1 if what == "block" else None
    options = {"fingerprint": "a", "tokens_per_batch": 100, **options}
    return ReferenceCache.make(folder, model, samples, Recorded(what, layer), **options)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def alone(model, index):
    """One sample's [T, V] logits, and the positions that predict its answer."""
    sample = SAMPLES[index]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]
    return logits.double(), [t - 1 for t in range(1, sample.num_tokens) if sample.labels[t] != -100]


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "hidden state"), ("phi", "hidden state"), ("gpt2", "hidden state"), ("gemma2", "log-probabilities")],
)
def test_distributions(models, tmp_path, family, form):
    model, said = models[family], []
    cache = make(tmp_path / "cache", model, notice=said.append)
    assert len(said) == 1 and form in said[0] and "KiB" in said[0]
    rows = cache.rows(torch.tensor(ORDER))
    expected = []
    for index in ORDER:
        logits, at = alone(model, index)
        expected.append(logits[at].log_softmax(1))
    expected = torch.cat(expected)
    found = rows.log_probs(slice(None))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.log_probs(slice(3, 5)), found[3:5])


def test_distributions_of_few_tokens_are_kept_whole(models, tmp_path):
    """The copy of the head costs more than it saves."""
    said = []
    cache = make(tmp_path / "cache", models["llama"], samples=SAMPLES[:3], notice=said.append)
    assert "log-probabilities" in said[0] and not list(tmp_path.rglob("head*"))
    logits, at = alone(models["llama"], 2)
    torch.testing.assert_close(cache.rows([2]).values.double(), logits[at].log_softmax(1), rtol=1e-4, atol=1e-5)


def test_losses_of_whole_answers(models, tmp_path):
    cache = make(tmp_path / "cache", models["llama"], "nll")
    expected = []
    for index in ORDER:
        logits, at = alone(models["llama"], index)
        tokens = [label for label in SAMPLES[index].labels if label != -100]
        expected.append(-sum(logits[t].log_softmax(0)[token].item() for t, token in zip(at, tokens, strict=True)))
    torch.testing.assert_close(cache.rows(ORDER).values.tolist(), expected, rtol=1e-5, atol=1e-5)


def test_states_of_a_block(models, tmp_path):
    cache = make(tmp_path / "cache", models["llama"], "block")
    rows = cache.rows(ORDER)
    assert rows.values.shape[1] == HIDDEN
    # Of the same model there is nothing to keep.
    loss = make_loss("rmu", LossOptions(rmu_layer=1))
    with torch.no_grad():
        assert loss.retain_values(models["llama"], collate(SAMPLES, ORDER), rows).max() < 1e-9


def test_the_original_head_is_kept(models, tmp_path):
    """Changing the model afterwards, its head too, does not change what it was."""
    model = build_family("llama")
    cache = make(tmp_path / "cache", model)
    before = cache.rows(ORDER).log_probs(slice(None))
    model.get_output_embeddings().weight.data.mul_(2.0)
    assert torch.equal(cache.rows(ORDER).log_probs(slice(None)), before)
    reopened = make(tmp_path / "cache", None)
    assert torch.equal(reopened.rows(ORDER).log_probs(slice(None)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_bits_of_the_model(tmp_path, dtype):
    model, said = build_family("llama", dtype=dtype), []
    cache = make(tmp_path / "cache", model, notice=said.append)
    assert "hidden state" in said[0] and cache.rows(ORDER).values.dtype == dtype
    batch = collate(SAMPLES, ORDER)
    with torch.no_grad():
        values = make_loss("kl").retain_values(model, batch, cache.rows(ORDER))
    assert values.dtype == torch.float32 and values.abs().max() < 1e-3


def test_under_autocast_what_was_computed_is_what_is_kept(models, tmp_path):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = make(tmp_path / "cache", models["llama"])
        batch = collate(SAMPLES, ORDER)
        with torch.no_grad():
            values = make_loss("kl").retain_values(models["llama"], batch, cache.rows(ORDER))
    assert values.abs().max() < 1e-3


def test_the_bytes_that_were_announced_are_the_bytes_on_disk(models, tmp_path):
    for what in ("nll", "block", "distributions"):
        said = []
        folder = tmp_path / what
        make(folder, models["llama"], what, notice=said.append)
        number, unit = said[0].split(" in ")[0].split()[-2:]
        announced = float(number) * {"B": 1, "KiB": 1024}[unit.replace("bytes", "B")]
        rows = sum(path.stat().st_size for path in folder.glob("*.safetensors")) - 8 * len(SAMPLES)  # positions
        headers = 300 * len(list(folder.glob("*.safetensors")))
        assert announced * 0.95 <= rows <= announced * 1.05 + headers


class Stop(Exception):
    pass


@pytest.mark.parametrize("what", ["nll", "block", "distributions"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch, what):
    monkeypatch.setattr(reference, "SHARD_BYTES", 200 if what == "nll" else 6000)
    heard = []
    whole = make(tmp_path / "whole", models["llama"], what, progress=heard.append)
    assert heard[-1] == len(SAMPLES) and heard == sorted(set(heard))
    assert len(list((tmp_path / "whole").glob("rows-*.json"))) > 1 or what == "nll"
    for last in heard:

        def stop(done, last=last):
            if done >= last:
                raise Stop

        folder = tmp_path / f"stopped-{last}"
        with pytest.raises(Stop):
            make(folder, models["llama"], what, progress=stop)
        resumed = []
        cache = make(folder, models["llama"], what, progress=resumed.append)
        assert not resumed or resumed[-1] == len(SAMPLES)
        assert digests(folder) == digests(tmp_path / "whole")
        assert torch.equal(cache.rows(ORDER).values, whole.rows(ORDER).values)


def test_a_whole_recording_needs_no_model(models, tmp_path):
    """On a resumed run the model in hand is no longer the untouched one."""
    first = make(tmp_path / "cache", models["llama"])
    again = make(tmp_path / "cache", None, notice=pytest.fail, progress=pytest.fail)
    assert torch.equal(again.rows([5]).values, first.rows([5]).values)


@pytest.mark.parametrize(
    ("changes", "what", "complaint"),
    [
        ({"fingerprint": "b"}, "nll", "model was a, is b"),
        ({"samples": make_samples(seed=1)}, "nll", "data was"),
        ({"tokens_per_batch": 50}, "nll", "tokens_per_batch was 100, is 50"),
        ({}, "block", "kind was nll, is block; layer was None, is 1"),
    ],
)
def test_a_recording_of_something_else_is_refused(models, tmp_path, changes, what, complaint):
    make(tmp_path, models["llama"], "nll")
    with pytest.raises(RunFolderError, match=f"made from something else.*{complaint}"):
        make(tmp_path, models["llama"], what, **changes)


@pytest.mark.parametrize("name", ["rows-0.*.safetensors", "rows-0.json", "reference.json", "head.*.safetensors"])
def test_damage_is_refused(models, tmp_path, name):
    make(tmp_path, models["llama"])
    (path,) = tmp_path.glob(name)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="damaged"):
        make(tmp_path, models["llama"])


def test_a_head_that_is_gone_is_refused(models, tmp_path):
    make(tmp_path, models["llama"])
    (tmp_path / "head.json").unlink()
    with pytest.raises(RunFolderError, match="output embedding is missing"):
        make(tmp_path, models["llama"])


def test_a_folder_that_cannot_be_made(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        make(tmp_path / "file" / "cache", models["llama"])


class WithDropout(TableModel):
    def __init__(self):
        super().__init__(torch.randn(VOCAB_SIZE, VOCAB_SIZE))
        self.layers[1] = nn.Dropout(0.5)


def test_the_model_is_left_as_it_came(tmp_path):
    model = WithDropout().train()
    model.layers[0].eval()
    model.head.weight.requires_grad_(True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = make(tmp_path / "a", model).rows(ORDER).values
    assert [module.training for module in model.modules()].count(False) == 1 and not model.layers[0].training
    assert model.head.weight.requires_grad and not values.requires_grad
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(make(tmp_path / "b", model).rows(ORDER).values, values)  # no dropout
