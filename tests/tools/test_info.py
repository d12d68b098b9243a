"""`python -m cl_kernels info`, and what its processes import."""

