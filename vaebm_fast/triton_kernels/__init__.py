"""Triton implementations of the ops, one module per op: the jit kernel and its launcher; no autograd, no modules.

`vaebm_fast.ops._register` registers them; `benchmarks.gpu.triton_aot` reports registers, shared memory and spills.
"""
