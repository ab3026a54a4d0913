"""Containers of stored images: folders, archives, databases, records and arrays; `find` opens what is at a path."""

from vaebm_fast.data.containers.base import Container, StoredArray
from vaebm_fast.data.containers.find import Split, open_container
from vaebm_fast.data.containers.folder import ImageFolder

__all__ = ["Container", "ImageFolder", "Split", "StoredArray", "open_container"]
