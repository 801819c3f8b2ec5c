"""Numbers alone: grids, rounding, ranges, packing. Nothing here knows a layer or a quantizer."""
