"""Quantized bit layouts, one module each. Every one opens as a :class:`~g2kit.formats.base.QuantizedWeight`."""
