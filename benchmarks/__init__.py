"""Benchmarks: `python -m benchmarks NAME`. Each module asks one question, and says what it compares with.

`ops`: single ops. `step`: a chain step of the whole pair, and whole chains. `training`, `loaders`: the two others.
`gpu`: all that needs a GPU, and what its kernels take. `work` counts what all of them divide by. Results are in
`results/`.
"""
