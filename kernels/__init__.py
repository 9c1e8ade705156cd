"""The ops as Triton kernels: one file per op, with the names and arguments of fastvae.reference."""
