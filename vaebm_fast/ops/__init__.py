"""Ops with more than one implementation, one module per op: argument checks, backend choice, fake, autograd.

`vaebm_fast.reference` holds the references; csrc and `vaebm_fast.triton_kernels` hold the kernels.
"""
