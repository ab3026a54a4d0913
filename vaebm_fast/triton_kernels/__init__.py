"""Triton implementations of the ops, one module per op: the jit kernel and its launcher; no autograd, no modules.

None exists yet; `vaebm_fast.ops._backend.OP_BACKENDS` says which op has which implementation.
"""
