"""Triton kernels of the ops: one file per op, with the names and arguments of fastvae.reference."""
