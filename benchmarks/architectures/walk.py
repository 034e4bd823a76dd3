"""One architecture ranked and compared; many, each in a process of its own."""

import contextlib
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from benchmarks.architectures.reference import Reference, Row, reference
from benchmarks.architectures.small import VOCABULARY, small_config, small_model
from fillm.errors import FillmError
from fillm.rank import Ranking, rank_parameters

Record = dict[str, Any]
COLUMNS = (
    "model_type", "class", "outcome", "reason", "parameters", "tensors", "covered_parameters", "together",
    "fallback", "noise_tensors", "largest_error", "worst_tensor", "seconds",
)  # fmt: skip
OUTCOMES = ("ok", "wrong", "refused", "not buildable")
TOLERANCE = 1e-4  # of |u - u_reference| / |u_reference|: float32 against float64
ROUNDINGS = 2.0  # more than that is allowed up to this multiple of what plain autograd in float32 is off by
NOISE = 1e-6  # a tensor whose v and retain gradients are this far below the model's largest is rounding in float32
SECONDS, BYTES = 60.0, 8 << 30  # for one architecture
_PRELOADED = ["torch", "transformers", "transformers.modeling_utils", "benchmarks.architectures.walk"]


def rows(count: int, seed: int) -> list[Row]:
    """Random tokens, 6 to 14 of them, the first third a prompt that does not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 15, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY - 2, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


FORGET, RETAIN = rows(3, seed=1), rows(4, seed=2)


def examine(model_type: str) -> Record:
    """Builds, ranks and compares one architecture; what goes wrong is the record's `outcome` and `reason`."""
    begun = time.monotonic()
    record: Record = dict.fromkeys(COLUMNS, "") | {"model_type": model_type}

    def done(outcome: str, reason: str = "") -> Record:
        return record | {"outcome": outcome, "reason": reason, "seconds": f"{time.monotonic() - begun:.1f}"}

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        config = small_config(model_type)
        mapping = transformers.AutoModelForCausalLM._model_mapping
        record["class"] = mapping[type(config)].__name__
        model = small_model(model_type)
        expected = reference(model, FORGET, RETAIN)
    except Exception as error:  # of foreign code: whatever it is, it is the reason
        return done("not buildable", _line(error))
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["tensors"] = len(expected)
    try:
        ranking = rank_parameters(model, None, FORGET, RETAIN, save_update=True)
    except FillmError as error:
        return done("refused", _line(error))
    except Exception as error:  # a fault of ours is a result, and the walk goes on
        return done("wrong", _line(error))
    fallback = ranking.record["fallback"]
    numels = {name: p.numel() for name, p in model.named_parameters()}
    record["fallback"] = "; ".join(sorted({_place(name) + ": " + why for name, why in fallback.items()}))
    record["covered_parameters"] = sum(count for name, count in numels.items() if name not in fallback)
    record["together"] = "no" if ranking.record["one_by_one"] else "yes"
    errors, record["noise_tensors"] = compare(ranking, expected)
    record["worst_tensor"] = max(errors, key=errors.__getitem__, default="")
    largest = errors.get(record["worst_tensor"], 0.0)
    record["largest_error"] = f"{largest:.1e}"
    if not largest <= TOLERANCE and not largest <= ROUNDINGS * plain_rounding(model, expected):
        return done("wrong", f"{record['worst_tensor']} differs by {largest:.1e}")
    return done("ok", ranking.record["one_by_one"] or "")


def plain_rounding(model: torch.nn.Module, expected: dict[str, Reference]) -> float:
    """The largest relative error of `u` by plain autograd in float32, one sample at a time."""
    plain = reference(model, FORGET, RETAIN, dtype=torch.float32)
    floor = NOISE * max(float(one.v.norm()) for one in expected.values())
    return max(
        float((plain[name].u - one.u).norm() / one.u.norm())
        for name, one in expected.items()
        if one.u is not None and plain[name].u is not None and float(one.v.norm()) > floor
    )


def compare(ranking: Ranking, expected: dict[str, Reference]) -> tuple[dict[str, float], int]:
    """The relative error of every tensor: the largest of that of `u`, of its score and of the damping.

    Returns:
        The errors by tensor, and how many tensors were left out because float32 cannot tell their gradient from zero.
    """
    sizes = {
        name: max(float(one.v.norm()), math.sqrt(one.damping * 10.0 * one.v.numel())) for name, one in expected.items()
    }
    floor = NOISE * max(sizes.values())
    columns = ranking.table.to_pydict()
    found = {name: place for place, name in enumerate(columns["name"])}
    if set(found) != set(expected):
        return {min(set(found) ^ set(expected)): math.inf}, 0
    errors, quiet = {}, 0
    for name, one in expected.items():
        place = found[name]
        if sizes[name] <= floor:
            quiet += sizes[name] > 0.0
            # Rounding may leave something, but never more than rounding would.
            errors[name] = 0.0 if (columns["forget_norm"][place] or 0.0) <= 10.0 * floor else math.inf
            continue
        if one.u is None:
            errors[name] = 0.0 if math.isinf(columns["score"][place]) else math.inf
            continue
        length = float(one.u.norm())
        differences = [
            abs(columns["score"][place] - length) / length if length else 0.0,
            abs(columns["damping"][place] - one.damping) / one.damping,
            float((ranking.updates[name].double() - one.u).norm()) / length if length else 0.0,
        ]
        errors[name] = math.inf if any(math.isnan(value) for value in differences) else max(differences)
    return errors, quiet


def _place(name: str) -> str:
    """A tensor's name without its numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def walk(model_types: Sequence[str]) -> Iterator[Record]:
    """`examine` for each, in a process of its own: one that dies or hangs ends no other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    for model_type in model_types:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(model_type, sender), daemon=True)
        begun = time.monotonic()
        process.start()
        sender.close()
        record = None
        with contextlib.suppress(EOFError):
            if receiver.poll(SECONDS):
                record = receiver.recv()
        if record is None:
            hung = process.is_alive() and time.monotonic() - begun >= SECONDS
            process.kill()
            process.join()
            what = f"took more than {SECONDS:.0f} s" if hung else f"its process died ({process.exitcode})"
            seconds = f"{time.monotonic() - begun:.1f}"
            record = dict.fromkeys(COLUMNS, "") | {
                "model_type": model_type, "outcome": "not buildable", "reason": what, "seconds": seconds,
            }  # fmt: skip
        process.join()
        yield record


def _child(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    sender.send(examine(model_type))
    sender.close()
