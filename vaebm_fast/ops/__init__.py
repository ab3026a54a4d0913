"""The operations that have more than one implementation, one module each: checks, choice of backend, fake, autograd.

`vaebm_fast.reference` holds the reference of each, csrc and `vaebm_fast.triton_kernels` the kernels.
"""
