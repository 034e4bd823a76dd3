"""Triton kernels, one file per op; nothing here is imported before an op first runs on a GPU.

Every module of an op has `launch` (takes what the op's other backends take), `small_case` (arguments for the check at
first use) and `compile_cases` (what `python -m fillm_kernels.compile_check` compiles ahead of time).
"""
