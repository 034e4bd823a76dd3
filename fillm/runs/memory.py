"""How an allocator says that memory has run out."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an allocator's: CUDA's has a type, the CPU's is a plain `RuntimeError`."""
    # "DefaultCPUAllocator: can't allocate memory ..." or "... not enough memory: you tried to allocate ..."
    told = any(words in str(error) for words in ("DefaultCPUAllocator", "not enough memory", "can't allocate memory"))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and told)
