"""Reports from plain data: one HTML page, JUnit, Markdown, a model-card fragment; given a document, never a model.

``validate`` checks a document against its schema; the others turn a valid one into text. ``html``, ``junit``, ``markdown``
and ``model_card`` take ``g2kit.report/1`` (parity), what is in ``quantized`` takes ``g2kit.quant-report/1``. ``page``,
``plots``, ``bars`` and ``tables`` know nothing of either.
"""

from . import quantized
from .html import html
from .junit import junit
from .markdown import markdown
from .model_card import model_card
from .schema import PARITY, QUANT, mistakes, schema, validate

__all__ = [
    "PARITY",
    "QUANT",
    "html",
    "junit",
    "markdown",
    "mistakes",
    "model_card",
    "quantized",
    "schema",
    "validate",
]
