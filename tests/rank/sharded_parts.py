"""What each process holds of a sharded model and its sums; under torchrun `-m tests.rank.sharded_parts MODEL OUT.json`.

OUT.json gets, by process, the bytes of the weights and of the accumulators of the retain pass, and of the whole. The
processes also hold the sharded tensors' own sums against those of whole tensors, and the check by groups of tensors
against that of all at once.
"""

import json
import sys
from pathlib import Path

import torch

from fillm.capture import ShardedCapture, ShardedGradients, verify_sharded
from fillm.capture.gradients import DenseGradients
from fillm.data import SampleSet
from fillm.models import catalogue, load_model, load_sharded, model_fingerprint
from fillm.models.sharded_tensors import into_shards, local, whole
from fillm.rank.layer_groups import layer_groups
from fillm.runs.processes import Processes
from fillm.statistics import MeanPower, RetainMoments, StepDots, any_entry, inner, squared_norm
from fillm.statistics import total as sum_of
from fillm.statistics.accumulators import zeros_like
from tests.rank.test_plan import sample_set


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Of what lies in this process."""
    return sum(local(t).untyped_storage().nbytes() for t in tensors)


def check_sums(parameter: torch.Tensor, processes: Processes) -> None:
    """Sums over the processes, dots and norms are those of whole tensors."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(2, *parameter.shape, generator=generator) for _ in range(processes.count)]
    own, v = draws[processes.index], torch.randn(parameter.shape, generator=generator)
    sharded, total = zeros_like(parameter), zeros_like(parameter)
    into_shards(v if processes.first else None, sharded)
    assert torch.equal(whole(sharded), v)
    gradients, product = ShardedGradients(DenseGradients(own), parameter), own.double() * v.double()
    torch.testing.assert_close(gradients.dots(sharded), product.flatten(1).sum(1))
    rows = product.flatten(1) if v.ndim < 2 else product.sum(-1)
    torch.testing.assert_close(gradients.axis_dots(sharded, 0), rows)
    weights = torch.tensor([2.0, -1.0])
    if processes.index == processes.count - 1:  # an idle one adds nothing
        gradients = ShardedGradients(None, parameter)
        assert gradients.axis_dots(sharded, 0).shape == (0, rows.shape[1])
    else:
        gradients.axis_dots(sharded, 0)
    gradients.add_weighted_(total, weights, alpha=0.5)
    wanted = 0.5 * sum(2.0 * two[0] - two[1] for two in draws[:-1])
    torch.testing.assert_close(whole(total), wanted)
    powers = zeros_like(parameter)
    gradients.add_powers_(powers, 2)
    torch.testing.assert_close(whole(powers), sum(two.double().square().sum(0) for two in draws[:-1]).float())
    assert abs(sum_of(total) - float(wanted.double().sum())) < 1e-4
    assert any_entry(total) and not any_entry(zeros_like(parameter))
    assert abs(squared_norm(total) / float(wanted.double().square().sum()) - 1) < 1e-6
    assert abs(inner(total, sharded) - float((wanted.double() * v.double()).sum())) < 1e-4


def check_groups(capture: ShardedCapture, samples: SampleSet) -> None:
    """A check by groups finds what one of all tensors does, and hands tensors out in the same order afterwards."""
    at_once = capture.like(list(capture.parameters))
    wanted = verify_sharded(at_once, samples, [list(capture.parameters)])
    infos = catalogue(capture.model)
    for count in (2, 3):
        groups = [[info.name for info in group] for group in layer_groups(infos, count)]
        by_groups = capture.like(list(capture.parameters))
        found = verify_sharded(by_groups, samples, groups)
        assert found.unreached == wanted.unreached and list(found.error) == list(wanted.error)
        assert max(abs(found.error[name] - error) for name, error in wanted.error.items()) < 1e-6
        assert by_groups._above == at_once._above


if __name__ == "__main__":
    processes = Processes("cpu")
    reference = load_model(sys.argv[1], device="cpu")
    model = load_sharded(sys.argv[1], dtype="float32", device=processes.device)
    assert model_fingerprint(model) == model_fingerprint(reference)
    capture = ShardedCapture(model, [name for name, _ in model.named_parameters()])
    for parameter in capture.parameters.values():
        check_sums(parameter, processes)
    check_groups(capture, sample_set([9, 5, 7], prompt=2))
    v = {name: zeros_like(parameter) for name, parameter in capture.parameters.items()}
    moments = RetainMoments(v, 14, 0.1, weighted=v)
    sums = [total for totals in moments.sums.values() for total in totals]
    weights = [*model.parameters()]
    by_weight = [*MeanPower(v, 14, 2).mean.values(), *StepDots(v, 14, element=True).state().values()]
    said = {"weights": bytes_of(weights), "accumulators": bytes_of([*v.values(), *sums, *by_weight])}
    said |= {"gathered": sum(tensor.untyped_storage().nbytes() for tensor in capture.operands.values())}
    said |= {"whole weights": 4 * sum(t.numel() for t in weights)}
    said |= {"whole accumulators": 4 * sum(t.numel() for t in [*v.values(), *sums, *by_weight])}
    heard = [json.loads(words) for words in processes.tell(json.dumps(said))]
    if processes.first:
        Path(sys.argv[2]).write_text(json.dumps(heard), encoding="utf-8")
    processes._disband(done=True)
