"""Assembles the parts of blocks into the job's output files (products), and verifies those files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from vaebm_fast.runtime.files import file_sha256
from vaebm_fast.sampling.folder import PARTS, STATE, Folder
from vaebm_fast.sampling.journal import Record
from vaebm_fast.sampling.manifest import read_json
from vaebm_fast.sampling.outputs import Output, Part, Product
from vaebm_fast.sampling.seeds import Seeds

PRODUCTS = f"{STATE}/products.json"  # {name: SHA-256} of assembled products


def intact_products(folder: Folder, output: Output, total: int) -> set[str]:
    """Names of the products whose files match their recorded SHA-256."""
    written = read_json(folder, PRODUCTS) or {}
    return {
        product.name
        for product in output.products(total)
        if product.name in written and folder.is_intact(product.name, written[product.name])
    }


def needs_part(block: int, batch_size: int, products: Sequence[Product], intact: set[str]) -> bool:
    """Whether a block's files are still needed: for an incomplete product, or because the format has no products."""
    into = [product for product in products if _overlaps(product, block, batch_size)]
    return not into or any(product.name not in intact for product in into)


def assemble(
    folder: Folder, output: Output, seeds: Seeds, batch_size: int, intact: set[str], records: Mapping[int, Record]
) -> None:
    """Write the products that are not `intact`, then remove the parts.

    A kill at any point loses nothing: a product is recorded once it is on disk, and parts stay until all are.
    """
    products = output.products(len(seeds))
    for product in products:
        if product.name in intact:
            continue
        blocks = [block for block in sorted(records) if _overlaps(product, block, batch_size)]
        failed = {seed for block in blocks for seed in records[block].failed}
        parts = [_part(folder, output, seeds, batch_size, records[block]) for block in blocks]
        wanted = [seed for seed in seeds.between(product.first, product.stop) if seed not in failed]
        with folder.replacing(product.name, durable=True) as temporary:
            with temporary.open("wb") as file:
                output.assemble(parts, wanted, file)
            sha256 = file_sha256(temporary)
        folder.write_json(PRODUCTS, {**(read_json(folder, PRODUCTS) or {}), product.name: sha256})
    if products:
        shutil.rmtree(folder.out / PARTS, ignore_errors=True)


def _part(folder: Folder, output: Output, seeds: Seeds, batch_size: int, record: Record) -> Part:
    [name] = record.files
    failed = set(record.failed)
    return Part(folder.out / name, [seed for seed in seeds.block(record.block, batch_size) if seed not in failed])


def _overlaps(product: Product, block: int, batch_size: int) -> bool:
    return block * batch_size < product.stop and product.first < (block + 1) * batch_size
