"""Triton kernels, one file per op; each is imported at the op's first call on it, so that triton stays optional."""
