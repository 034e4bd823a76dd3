"""Triton kernels, one file per op; imported at an op's first call, never by `import fillm_kernels`."""
