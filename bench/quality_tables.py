"""What bench/quant_quality.py prints: Markdown tables, ratios held against goals, and a curve of uniform schemes."""

from __future__ import annotations

import numpy as np


class Table:
    """A Markdown table printed row by row, so that an interrupted run leaves what it found."""

    def __init__(self, title: str, *columns: str) -> None:
        print(f"\n### {title}\n")
        print("|", " | ".join(columns), "|")
        print("|" + "---|" * len(columns), flush=True)

    def row(self, *cells: object) -> None:
        """One line; numbers with three digits."""
        print("|", " | ".join(_cell(c) for c in cells), "|", flush=True)


def _cell(x: object) -> str:
    if x is None:
        return ""
    return f"{x:.3g}" if isinstance(x, float) else str(x)


class Verdict:
    """Which goals were missed; the last lines of the output."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.checked = 0

    def check(self, what: str, found: float, goal: float | None) -> None:
        """Note a ratio above its goal, or above 1 where there is none."""
        self.checked += 1
        if found > (goal or 1.0):
            self.lines.append(f"{what}: {found:.3f}, goal {goal or 1.0}")

    def print(self) -> None:
        """Say where it loses."""
        print(f"\n{self.checked} ratios, {len(self.lines)} above their goals.")
        for line in self.lines:
            print(f"- loses: {line}")


class Points:
    """Uniform schemes that were measured: format -> (bits per weight, KL x 1000)."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[float, float]]] = {}

    def add(self, format: str, bits: float, kl: float) -> None:
        """One more."""
        self._found.setdefault(format, []).append((bits, kl))

    def span(self, format: str) -> tuple[float, float]:
        """Smallest and largest size."""
        sizes = [bits for bits, _ in self._found.get(format, [])]
        return (min(sizes), max(sizes)) if sizes else (1.0, 0.0)

    def at(self, format: str, bits: float) -> float:
        """KL at a size, the logarithm interpolated between the neighbours."""
        bits_of, kls = zip(*sorted(self._found[format]), strict=True)
        return float(np.exp(np.interp(bits, bits_of, np.log(kls))))
