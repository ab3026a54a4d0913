"""Finds damage in the coded part of a JPEG file, which decoders pass over silently."""

from __future__ import annotations

import numpy as np
import torch

from vaebm_fast.runtime import extension


def stream_fault(data: bytes) -> str | None:
    """The first fault of a JPEG file as a phrase; None if it is sound.

    None also without the compiled part and for what is not checked: arithmetic, lossless and hierarchical coding,
    more than four components, a height that follows the first scan, no Huffman tables, over 200 million blocks.
    Damage that leaves a stream as an encoder may write it, such as a coefficient of another sign, is not found.
    """
    if not extension.is_available():
        return None
    fault: str = torch.ops.vaebm_fast.jpeg_stream_fault(torch.tensor(np.frombuffer(data, np.uint8)))
    return None if fault == "" or fault.startswith("not checked") else fault
