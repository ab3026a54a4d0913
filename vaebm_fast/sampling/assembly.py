"""Assembles the parts of blocks into the job's output files, and verifies those files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from vaebm_fast.runtime.files import file_sha256
from vaebm_fast.sampling.folder import PARTS, STATE, Folder
from vaebm_fast.sampling.journal import Record
from vaebm_fast.sampling.manifest import read_json
from vaebm_fast.sampling.options import Seeds
from vaebm_fast.sampling.outputs import Output, Part, Product

PRODUCTS = f"{STATE}/products.json"  # file name -> SHA-256 of each assembled product


def intact_products(folder: Folder, output: Output, total: int) -> set[str]:
    """Names of the products that exist and match their recorded SHA-256."""
    written = read_json(folder, PRODUCTS) or {}
    return {
        product.name
        for product in output.products(total)
        if product.name in written and folder.is_intact(product.name, written[product.name])
    }


def needs_part(block: int, batch_size: int, products: Sequence[Product], intact: set[str]) -> bool:
    """Whether an unfinished product needs this block's part; always true for formats without products."""
    into = [product for product in products if _overlaps(product, block, batch_size)]
    return not into or any(product.name not in intact for product in into)


def assemble(
    folder: Folder, output: Output, seeds: Seeds, batch_size: int, intact: set[str], records: Mapping[int, Record]
) -> None:
    """Assemble each product that is not `intact`, then delete the parts.

    Safe to kill at any point: a product is recorded after it is durable, and parts are kept until all are recorded.
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
