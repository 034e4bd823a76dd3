"""Launchers of the CUDA C++ kernels of csrc/cuda, one file per op; nothing here is imported before an op first runs.

Every module of an op has `launch` (takes what the op's other backends take) and `small_case` (arguments for the check
at first use). Scratch memory is torch's, so that it follows the stream; kernels run on torch's current stream.
"""
