"""Microbenchmarks, `python -m cl_kernels bench`; docs/benchmarking.md says how they are made."""
