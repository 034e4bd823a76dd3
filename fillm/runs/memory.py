"""How an allocator says that memory has run out, and what a person is told then."""

import ctypes
import os
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
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


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


def give_back_freed_blocks() -> None:
    """From now on blocks of 256 KiB and more go back to the system when they are freed (glibc; elsewhere nothing).

    glibc learns from the blocks that a process frees to keep them for the next of their size: quicker, but holes that
    no other size fills stay in memory. The process keeps to this until it ends.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if allocator is not None:
        allocator(_M_MMAP_THRESHOLD, 1 << 18)
