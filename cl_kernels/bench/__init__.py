"""Microbenchmarks of the losses: `python -m cl_kernels bench`; docs/benchmarking.md says how it is measured."""
