"""Colours of the pages, one row each: light, dark. Everything else of the look is in page.css.

Series and sequential colours keep apart under deuteranopia, protanopia and tritanopia (blue and orange differ in lightness
too); verdicts never rely on colour: each has a word and a shape.
"""

from __future__ import annotations

TOKENS: dict[str, tuple[str, str]] = {
    "bg": ("#ffffff", "#131519"),
    "raised": ("#f6f6f4", "#1b1e24"),
    "text": ("#1b1d21", "#e8eaed"),
    "muted": ("#5c6370", "#a0a8b4"),
    "faint": ("#868c97", "#7c8491"),
    "line": ("#e3e4e6", "#2b3038"),
    "grid": ("#ececee", "#242932"),
    "axis": ("#b4b8bf", "#4a515d"),
    "accent": ("#1d5fa8", "#7db8f0"),
    "c1": ("#1d66b0", "#6cb2f2"),
    "c2": ("#cf5410", "#f5924e"),
    "c3": ("#0c7d6c", "#48c4a8"),
    "floor": ("#e7e9ed", "#272c35"),
    "mark": ("#fde9c9", "#4a3815"),
    # from little to much, one hue
    "q0": ("#eaf2fa", "#1b2735"),
    "q1": ("#c5dcf1", "#22425f"),
    "q2": ("#93bfe4", "#2c618f"),
    "q3": ("#5897cf", "#4386bd"),
    "q4": ("#2a6bab", "#79b3e3"),
    "q5": ("#13406f", "#cbe4fa"),
    "on-q3": ("#1b1d21", "#131519"),
    "pass": ("#0b7a55", "#4cc596"),
    "pass-bg": ("#e6f4ee", "#15302a"),
    "fail": ("#bd2a12", "#ff8266"),
    "fail-bg": ("#fcebe7", "#3a1d18"),
    "inconclusive": ("#8a5a00", "#e6b04c"),
    "inconclusive-bg": ("#fbf1dc", "#352a14"),
    "error": ("#6a3fa5", "#bd9cf0"),
    "error-bg": ("#f1ebfa", "#2a2140"),
}


def _block(selector: str, side: int) -> str:
    body = "".join(f"--{name}:{pair[side]};" for name, pair in TOKENS.items())
    scheme = ("light", "dark")[side]
    return f"{selector}{{color-scheme:{scheme};{body}}}"


def variables() -> str:
    """CSS custom properties: light, dark where the system or the reader wants it, light on paper."""
    dark = _block(":root:not([data-theme=light])", 1)
    return "\n".join(
        (
            _block(":root", 0),
            f"@media screen and (prefers-color-scheme: dark){{{dark}}}",
            f"@media screen{{{_block(':root[data-theme=dark]', 1)}}}",
        )
    )
