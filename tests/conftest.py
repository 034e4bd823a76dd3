"""What every test starts from: few threads, fixed seeds, no network."""

import os

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# Waiting threads sleep instead of spinning: on a busy machine spinning slows small parallel pieces a hundredfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What torch asks for before cuBLAS runs in its deterministic mode, which also poisons unwritten memory.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("FILLM_BACKEND", None)

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Triton reads it when it is first imported, which torch leaves to the first kernel: without a GPU its kernels run on
# CPU tensors, in the interpreter. Tests of the compiler start processes of their own without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

THREADS = 2
# With a limit, what has not begun by then is skipped and says so: a slow machine shows what it can of the slow tests.
SECONDS = float(os.environ.get("FILLM_TEST_SECONDS") or "inf")
_BEGUN = time.monotonic()

torch.set_num_threads(min(THREADS, torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures, which may be what takes the time."""
    if time.monotonic() - _BEGUN > SECONDS:
        pytest.skip(f"not begun: FILLM_TEST_SECONDS={SECONDS:.0f} were up")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """What processes under torchrun have, for a run beside them that is to do the same sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
