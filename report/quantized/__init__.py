"""Quantization reports (``g2kit.quant-report/1``): one run as a page, several in one plot, a model-card fragment."""

from .card import card
from .compare import comparison, names_of
from .html import html

__all__ = ["card", "comparison", "html", "names_of"]
