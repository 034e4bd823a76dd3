"""Models in half precision: their noise is measured and named, and float16's gradients do not vanish."""

import pytest
import torch

import fillm.rank.precision as precision
from fillm import rank_parameters
from fillm.capture import Capture
from fillm.data import SampleSet, collate
from fillm.rank.precision import relative_difference, warn_of_noise
from tests.capture.reference import reference_gradients
from tests.families import build_family, build_lora
from tests.rank.direct import FORGET_ROWS, RETAIN, RETAIN_ROWS


class Warnings:
    """A console that only remembers."""

    def __init__(self):
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


def capture_of(model, names=None):
    return Capture(model, names or [name for name, _ in model.named_parameters()])


def reference_difference(model, samples: SampleSet, chosen: list[int]) -> float:
    """`|g - g32| / |g32|` from plain autograd, the model's own dtype against float32."""
    squares = [0.0, 0.0]
    for position in chosen:
        batch = samples.subset([position])[0]
        both = []
        for twin in (model, build_family("llama", dtype=model.dtype).float()):
            twin.requires_grad_(True)
            ids, labels = torch.tensor([batch.input_ids]), torch.tensor([batch.labels])
            logits = twin(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:])
            both.append(torch.autograd.grad(loss, list(twin.parameters())))
            twin.requires_grad_(False)
        for low, wide in zip(*both, strict=True):
            squares[0] += float((low.double() - wide.double()).square().sum())
            squares[1] += float(wide.double().square().sum())
    return (squares[0] / squares[1]) ** 0.5


def test_the_difference_is_that_of_plain_autograd():
    model = build_family("llama", dtype=torch.bfloat16)
    lengths = sorted(range(len(RETAIN)), key=lambda i: (RETAIN[i].num_tokens, i))
    chosen = sorted({lengths[0], lengths[len(lengths) // 2]})
    found = relative_difference(capture_of(model), RETAIN)
    assert 1e-3 < found < 0.05
    # The two round differently along the way: only the size can agree.
    assert found == pytest.approx(reference_difference(model, RETAIN, chosen), rel=0.5)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_a_float32_model_has_no_difference_and_no_warning(layout):
    capture, console = capture_of(build_family("llama")), Warnings()
    assert relative_difference(capture, RETAIN, layout) == 0.0
    assert warn_of_noise(capture, RETAIN, console, layout) is None and console.lines == []
    assert warn_of_noise(capture_of(build_family("llama", dtype=torch.float64)), RETAIN, console) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_little_noise_is_recorded_but_not_warned_of(dtype):
    console = Warnings()
    found = warn_of_noise(capture_of(build_family("llama", dtype=dtype)), RETAIN, console)
    assert 0.0 < found < 0.05 and console.lines == []


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_much_noise_is_warned_of_with_its_figure(dtype, name, monkeypatch):
    monkeypatch.setattr(precision, "LARGEST_DIFFERENCE", 1e-6)
    console = Warnings()
    found = warn_of_noise(capture_of(build_family("llama", dtype=dtype)), RETAIN, console)
    assert len(console.lines) == 1
    assert console.lines[0].startswith(f"gradients in {name} differ from float32 by {100 * found:.1f} % ")
    assert "--dtype float32" in console.lines[0]


def noisy(model):
    """A head that amplifies the rounding of what it is given."""
    head = model.get_output_embeddings().weight
    head.data = head.data * 60.0
    return model


def test_a_noisy_model_is_warned_of_once_and_ranks(caplog):
    model = noisy(build_family("llama", dtype=torch.bfloat16))
    with caplog.at_level("WARNING", logger="fillm"):
        ranking = rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS)
    lines = [record.getMessage() for record in caplog.records if "differ from float32" in record.getMessage()]
    figure = ranking.record["checks"]["low_precision_difference"]
    assert figure > 0.05 and len(lines) == 1 and f" {100 * figure:.1f} % " in lines[0]
    assert len(ranking) == 21
    with caplog.at_level("WARNING", logger="fillm"):
        caplog.clear()
        clean = rank_parameters(noisy(build_family("llama")), None, FORGET_ROWS, RETAIN_ROWS)
    assert caplog.records == [] and clean.record["checks"]["low_precision_difference"] is None


def test_a_difference_that_is_not_a_number_is_warned_of(monkeypatch):
    monkeypatch.setattr(precision, "relative_difference", lambda *_: float("nan"))
    console = Warnings()
    warn_of_noise(capture_of(build_family("llama", dtype=torch.float16)), RETAIN, console)
    assert len(console.lines) == 1 and "nan %" in console.lines[0]


def test_float32_adapters_see_the_noise_of_the_model_they_adapt():
    model = build_lora("llama", ["q_proj", "up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    found = warn_of_noise(capture_of(model, names), RETAIN, Warnings())
    assert found is not None and found > 1e-4


def test_the_model_is_left_in_its_own_precision():
    model = build_family("llama", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    relative_difference(capture_of(model), RETAIN)
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[n]) for n, p in model.named_parameters())


def squared_norms(model, samples: SampleSet) -> dict[str, torch.Tensor]:
    out = {name: torch.zeros(len(samples), dtype=torch.float64) for name, _ in model.named_parameters()}

    def observe(name, gradients, positions):
        out[name][positions] = gradients.squared_norms()

    capture_of(model).run(collate(samples, range(len(samples))), samples, observe)
    return out


def flat(dtype):
    """A head so flat that what reaches the layers below it is under float16's smallest number."""
    model = build_family("llama", dtype=dtype)
    model.lm_head.weight.data = model.lm_head.weight.data * 1e-5
    return model


@pytest.mark.parametrize("make", [lambda dtype: build_family("llama", dtype=dtype), flat], ids=["plain", "small"])
def test_float16_squared_norms_are_close_to_float32(make):
    model = make(torch.float16)
    found = squared_norms(model, RETAIN)
    references = reference_gradients(model, RETAIN)
    for name, q in found.items():
        exact = torch.stack([one[name].square().sum() for one in references])
        assert bool((exact > 0).all()) and torch.allclose(q, exact, rtol=0.03, atol=0.0), name


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("settings", [{}, {"granularity": "row"}, {"method": "wagle"}], ids=["soir", "row", "wagle"])
def test_half_precision_models_rank_like_float32(dtype, rtol, settings):
    model = build_family("llama", dtype=dtype)
    found = rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, **settings)
    wide = rank_parameters(model.float(), None, FORGET_ROWS, RETAIN_ROWS, **settings)
    largest: dict[str, float] = {}
    for key, score in wide.scores.items():
        tensor = key if isinstance(key, str) else key[0]
        largest[tensor] = max(largest.get(tensor, 0.0), score)
    assert set(found.scores) == set(wide.scores)
    for key, score in found.scores.items():
        scale = largest[key if isinstance(key, str) else key[0]]
        assert abs(score - wide.scores[key]) <= rtol * scale, key
    if found.updates is not None:
        assert {u.dtype for u in found.updates.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_the_float32_copy_is_the_model_and_shares_nothing_with_it(family):
    model = build_family(family, dtype=torch.bfloat16)
    found = precision.float32_copy(model, torch.device("cpu"))
    wanted = build_family(family, dtype=torch.bfloat16).float()
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in wanted.named_parameters()]
    for (name, one), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not own & {t.data_ptr() for t in [*found.parameters(), *found.buffers()]}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in found.parameters()
    )


def test_the_copy_goes_where_there_is_room(monkeypatch):
    model = build_family("llama")
    assert precision.place_of_copy(model) == torch.device("cpu")
    weights = 4 * sum(p.numel() for p in model.parameters())

    class OnGpu(torch.nn.Module):
        """What is asked of a model on a device that is not here."""

        def parameters(self, recurse=True):
            return (Elsewhere(p) for p in model.parameters())

    class Elsewhere:
        device = torch.device("cuda", 0)

        def __init__(self, parameter):
            self.numel, self.is_floating_point = parameter.numel, parameter.is_floating_point

    for free, place in ((2 * weights, "cuda"), (weights, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert precision.place_of_copy(OnGpu()).type == place
