"""How an allocator says that memory has run out, and what a person is told then."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fillm.errors import OutOfMemoryError

# "DefaultCPUAllocator: can't allocate memory ..." or "... not enough memory: you tried to allocate ..."; of a mapped
# file "Cannot allocate memory (12)"; of the stack of a thread the last.
_WORDS = (
    "DefaultCPUAllocator", "not enough memory", "can't allocate memory", "Cannot allocate memory",
    "can't start new thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's: CUDA's has a type, the CPU's is a plain `RuntimeError`."""
    told = any(words in str(error) for words in _WORDS)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and told)


@contextmanager
def memory_explained(
    remedy: str = "--dry-run says what a run takes; give --include, or --dtype",
) -> Iterator[None]:
    """Memory that runs out where there is no batch to halve, as one line that ends with `remedy`.

    Raises:
        OutOfMemoryError: in the place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "no reason given"
        raise OutOfMemoryError(f"out of memory outside of a batch ({reason}); {remedy}") from None
