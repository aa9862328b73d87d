"""Reports from plain data: one HTML page, JUnit, Markdown, a model-card fragment; given a document, never a model.

``validate`` checks a ``g2kit.report/1`` document against ``schema.json``; the others turn a valid one into text.
``page``, ``plots``, ``bars`` and ``tables`` know nothing of verification and serve other reports too.
"""

from .html import html
from .junit import junit
from .markdown import markdown
from .model_card import model_card
from .schema import schema, validate

__all__ = ["html", "junit", "markdown", "model_card", "schema", "validate"]
