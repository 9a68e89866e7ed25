"""Where compiled kernels are kept: key, store, publishing."""
