"""Triton kernels, one op per file; none in this version."""
