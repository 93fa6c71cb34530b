"""Subnets as plain torch modules."""

from fastslim.export.subnet import export_subnet

__all__ = ["export_subnet"]
