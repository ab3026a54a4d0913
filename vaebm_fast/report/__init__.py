"""Pictures of a run: grids of images (`pictures`) and, with Matplotlib, figures (`figures`)."""

from vaebm_fast.report.pictures import save_grid, tile

__all__ = ["save_grid", "tile"]
