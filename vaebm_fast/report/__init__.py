"""Reports of a run: image grids (`pictures`) and Matplotlib figures (`figures`)."""

from vaebm_fast.report.pictures import save_grid, tile

__all__ = ["save_grid", "tile"]
