"""Parts of blocks put together to the job's files, and which of these are there and whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from vaebm_fast.runtime.files import file_sha256
from vaebm_fast.sampling.folder import PARTS, STATE, Folder
from vaebm_fast.sampling.journal import Record
from vaebm_fast.sampling.manifest import read_json
from vaebm_fast.sampling.options import Seeds
from vaebm_fast.sampling.outputs import Output, Part, Product

PRODUCTS = f"{STATE}/products.json"  # SHA-256 by name of what has been put together


def intact_products(folder: Folder, output: Output, total: int) -> set[str]:
    """Names of the products that are there with the content that was written."""
    written = read_json(folder, PRODUCTS) or {}
    return {
        product.name
        for product in output.products(total)
        if product.name in written and folder.is_intact(product.name, written[product.name])
    }


def needs_part(block: int, batch_size: int, products: Sequence[Product], intact: set[str]) -> bool:
    """Whether a block's part is still to go into a product; where there are none, its own files are needed."""
    into = [product for product in products if _overlaps(product, block, batch_size)]
    return not into or any(product.name not in intact for product in into)


def assemble(
    folder: Folder, output: Output, seeds: Seeds, batch_size: int, intact: set[str], records: Mapping[int, Record]
) -> None:
    """Make the products that are not `intact`, one after the other; then the parts go.

    A kill at any point loses nothing: a product is noted once it is whole on the disk, and parts stay until all are.
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
