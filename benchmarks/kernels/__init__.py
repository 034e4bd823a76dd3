"""One benchmark per op of fillm_kernels."""
