"""Every op, on every backend that runs here, held to what all ops promise; the table is contracts.py.

What is one op's own (its formula on random numbers, its bounds, its edge cases) is in the op's test file.
"""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fillm_kernels
import pytest
import torch
from fillm_kernels import BackendError, ShapeError, dispatch, native
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.kernels.contract import (
    SHAPES,
    SMALL,
    Arguments,
    Contract,
    Recorder,
    Shape,
    assert_is,
    assert_same_bits,
    bits_of,
    changed,
    copy,
    flat,
    force,
    noise,
    on,
    strided,
    takes,
    tensors_of,
    wide_of,
)
from tests.kernels.contracts import CONTRACTS
from tests.kernels.ragged import DTYPES

ROOT = Path(__file__).parents[2]
NOT_OPS = {"backends", "select_bits", "select_rows", "side_rows", "side_sketch", "tensorsketch_side"}
PAIRS = [(contract, backend) for contract in CONTRACTS for backend in contract.backends()]
every_contract = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
every_backend = pytest.mark.parametrize(
    ("contract", "backend"), PAIRS, ids=[f"{contract.name}-{backend}" for contract, backend in PAIRS]
)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten holds NaN, or the largest whole number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_every_op_and_every_public_function_is_in_the_table():
    assert {contract.op for contract in CONTRACTS} == set(dispatch._registry)
    functions = {name for name in fillm_kernels.__all__ if not isinstance(getattr(fillm_kernels, name), type)}
    assert {contract.call.__name__ for contract in CONTRACTS} == functions - NOT_OPS
    for contract in CONTRACTS:  # what is claimed to be written is written, so that "unchanged" means something
        arguments = contract.build(SMALL, torch.float32)
        before = copy(arguments)
        contract.results(arguments)
        now, then = tensors_of(arguments), tensors_of(before)
        assert {name.split("[")[0] for name in now if not torch.equal(now[name], then[name])} == set(contract.written)


def _shapes(contract: Contract, backend: str, dtype: torch.dtype) -> Sequence[Shape]:
    """All shapes; fewer where one program runs after the other, in Python, and a type more is a cast more."""
    if backend != "triton" or not dispatch.interpreted():
        return SHAPES
    count = len(SHAPES) if dtype == torch.float32 else 4
    return SHAPES[: count - 3] if contract.many_programs else SHAPES[:count]


@every_backend
def test_the_answer_in_every_type_and_shape_twice_from_inputs_left_as_they_were(
    contract, backend, poisoned, monkeypatch
):
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        if shape not in _shapes(contract, backend, dtype):
            continue
        device = force(contract, backend, monkeypatch)
        given = contract.build(shape, dtype)
        answer = contract.answer(given)
        one, other = on(device, copy(given)), on(device, copy(given))
        if not takes(contract, backend, dtype):
            with pytest.raises(BackendError, match="asked for float64"):
                contract.results(one)
            continue
        results = contract.results(one)
        assert_is(results, answer, contract)
        assert all(t.dtype in (dtype, wide_of(dtype), torch.float64, torch.uint8) for t in results)
        assert_same_bits(contract.results(other), results)
        kept = {n: t.cpu() for n, t in tensors_of(one).items() if n.split("[")[0] not in contract.written}
        assert_same_bits(list(kept.values()), [tensors_of(given)[name] for name in kept])


@every_contract
def test_results_are_float32_and_for_float64_float64(contract):
    for dtype in DTYPES:
        results = contract.results(contract.build(SMALL, dtype))
        if contract.op == "top_mask":
            assert [t.dtype for t in results] == [torch.uint8] * 3 + [dtype]
        elif contract.op == "masked_norm":
            assert results[0].dtype == torch.float64
        else:
            assert results[0].dtype == (dtype if "masked" in contract.op else wide_of(dtype))


@every_backend
def test_any_strides_give_the_answer_or_a_named_error_and_nothing_beside_is_touched(
    contract, backend, poisoned, monkeypatch
):
    shape = SMALL if backend == "triton" and contract.many_programs else SHAPES[4]
    for dtype, turned in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        device = force(contract, backend, monkeypatch)
        given = contract.build(shape, dtype)
        rooms = {}

        def place(name: str, tensor: Tensor, turned: bool = turned, rooms: dict[str, Tensor] = rooms) -> Tensor:
            if name.split("[")[0] in contract.contiguous:
                return tensor.clone()
            if turned:  # every matrix column by column
                return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor.flip(0).clone().flip(0)
            rooms[name], view = strided(tensor)
            return view

        if device != "cpu":
            pytest.skip("views are laid out on the CPU; a GPU backend takes strides through the same arguments")
        views = changed(given, place)
        before = {name: room.clone() for name, room in rooms.items()}
        assert_is(contract.results(views), contract.answer(given), contract)
        for name, room in rooms.items():
            if name.split("[")[0] in contract.written:
                strided_part = tuple(slice(1, 2 * size + 1, 2) for size in tensors_of(views)[name].shape)
                room[strided_part] = before[name][strided_part] = 0
            assert torch.equal(bits_of(room), bits_of(before[name]))
    for name in contract.contiguous:
        given = contract.build(SHAPES[4], torch.float32)
        bad = changed(given, lambda n, t, name=name: strided(t)[1] if n.split("[")[0] == name else t)
        with pytest.raises(ShapeError, match="contiguous"):
            contract.results(bad)


@every_contract
def test_ops_are_registered_as_torch_expects(contract):
    # Every op has contracts enough for all types; a check takes a second.
    dtype = DTYPES[CONTRACTS.index(contract) % len(DTYPES)]
    with Recorder() as recorder:
        contract.call(**contract.build(SMALL, dtype))
    op, arguments = recorder.calls[0]
    torch.library.opcheck(op, tuple(arguments))


@every_contract
def test_compiles_as_one_graph_and_gives_the_same_bits(contract):
    # Masks are turned into selections by their values, which no graph holds: that is done before.
    given = noise(with_selections(contract.build(SMALL, torch.float32)))
    one, other = copy(given), copy(given)

    def step(tensors: dict[str, Any]) -> list[Tensor]:
        return [tensor + 1 for tensor in flat(contract.call(**tensors))]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(one)
    assert_same_bits(compiled, step(other))
    assert_same_bits(list(tensors_of(one).values()), list(tensors_of(other).values()))


def test_whole_numbers_that_vary_are_symbols_of_one_graph():
    torch._dynamo.reset()
    g, x, dy, offsets = torch.randn(2, 30), torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2])
    for call in (
        lambda k: fillm_kernels.sketch(g, k, seed=k, offset=k),
        lambda k: fillm_kernels.outer_sketch(x, dy, offsets, k, seed=k),
        lambda k: fillm_kernels.factored_sketch(x, dy, offsets, (k, 4), "factored-sjlt", k),
        lambda k: fillm_kernels.top_mask([g], k).bits[0],
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        for k in (8, 12):
            assert torch.equal(compiled(k), call(k))


def with_selections(arguments: Arguments) -> Arguments:
    def select(mask: Tensor, tensor: Tensor) -> Any:
        if mask.dtype == torch.uint8:
            return fillm_kernels.select_bits(mask, tensor.numel())
        return fillm_kernels.select_rows(mask, tensor.shape)

    if "masks" in arguments:
        pairs = zip(arguments["masks"], arguments["grads"], strict=True)
        return {**arguments, "masks": [select(mask, grad) for mask, grad in pairs]}
    return {**arguments, "mask": select(arguments["mask"], arguments["param"])} if "mask" in arguments else arguments


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from modules that its compiler imports
def test_the_default_compiler_gives_the_same_bits():
    torch._dynamo.reset()
    for contract in CONTRACTS[::4]:
        given = with_selections(contract.build(SMALL, torch.float32))
        one, other = copy(given), copy(given)
        compiled = torch.compile(lambda tensors, call=contract.call: flat(call(**tensors)), fullgraph=True)
        assert_same_bits([t.clone() for t in compiled(one)], flat(contract.call(**other)))
        torch._dynamo.reset()


@every_contract
def test_fake_results_have_the_shapes_types_and_strides_of_real_ones(contract):
    for shape, dtype in itertools.product((SMALL, SHAPES[1], SHAPES[3]), (torch.float32, torch.bfloat16)):
        given = with_selections(contract.build(shape, dtype))
        if "mask" in given or "masks" in given:
            with Recorder() as recorder:
                contract.call(**copy(given))
            op, arguments = recorder.calls[0]
            real, calls = op(*copy({"all": list(arguments)})["all"]), lambda a, op=op: op(*a["all"])
            given = {"all": list(arguments)}
        else:
            real, calls = contract.call(**copy(given)), lambda a: contract.call(**a)
        with FakeTensorMode() as mode:
            fake = calls(changed(given, lambda _, t, mode=mode: mode.from_tensor(t)))
        for a, b in zip(flat(fake), flat(real), strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert a.numel() < 2 or a.stride() == b.stride()


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@every_contract
def test_two_threads_at_once_get_the_bits_of_one(contract, backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    given = [noise(contract.build(shape, torch.float32)) for shape in (SHAPES[4], SHAPES[6])]
    want = [contract.results(copy(arguments)) for arguments in given]
    start, found = threading.Barrier(2), [[], []]

    def work(which: int) -> None:
        start.wait()
        for _ in range(4):
            found[which].append(contract.results(copy(given[which])))

    workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, wanted in zip(found, want, strict=True):
        assert len(results) == 4
        for result in results:
            assert_same_bits(result, wanted)


def test_a_switch_of_matrix_precision_stays_put_while_threads_come_and_go():
    from fillm_kernels.products import ieee_products

    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        first, second = ieee_products(), ieee_products()
        first.__enter__()
        second.__enter__()  # another thread's, whose products are still under way when the first one's end
        first.__exit__(None, None, None)
        assert switch.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("contract", [c for c in CONTRACTS if c.thread_proof], ids=lambda contract: contract.name)
def test_the_number_of_threads_changes_no_bit_in_cpp(contract, instruction_set, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", "cpu")
    run = dispatch._registry[contract.op]["cpu"].run
    entry = dispatch.Backend(lambda *args: run(*args, instruction_set))
    monkeypatch.setitem(dispatch._registry[contract.op], "cpu", entry)
    given, before, results = noise(contract.build(SHAPES[6], torch.float32)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(contract.results(copy(given)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


FORK = """
import os, sys, torch
from tests.kernels.contract import SMALL, changed
from tests.kernels.contracts import CONTRACTS
torch.manual_seed(0)
CONTRACTS = [contract for contract in CONTRACTS if contract.roundoff == 0]
given = [contract.build(SMALL, torch.float32) for contract in CONTRACTS]
copy = lambda arguments: changed(arguments, lambda _, t: t.clone())
torch.set_num_threads(2)
before = [contract.results(copy(a)) for contract, a in zip(CONTRACTS, given)]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's data loaders do: GNU OpenMP has no threads in a forked process
    after = [contract.results(copy(a)) for contract, a in zip(CONTRACTS, given)]
    same = all(torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_gets_the_same_numbers():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    code = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    run = subprocess.run(code, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
