"""The arithmetic of one tile of positions of two logit streams, kept apart so that it can be read against the formulas.

The logits of a tile stay in a scratch buffer of bounded size while two passes go over it: the first finds maxima,
the log-sum-exps and the candidates for the top ids, the second the divergences, which need both log-sum-exps. So each
unembedding product is computed once. With p, q the two distributions and x = log q - log p,

    KL(p||q) = sum p (expm1(x) - x),   KL(q||p) = sum p (x expm1(x) - (expm1(x) - x)),   TV = sum p |expm1(x)| / 2

are sums of terms that are never negative, so nearly equal streams keep their digits. x comes from the *difference* of
the logits. Where both tables are the same that is itself a product, of the hidden states' difference, held instead of
the second stream; the soft-cap maps it by

    tanh(u + v) - tanh(u) = tanh(v) (1 - tanh(u)^2) / (1 + tanh(u) tanh(v)).

Where x is small, expm1(x) - x is a polynomial; sums over blocks of the vocabulary go on in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP_K = (5, 10)
SMALL = 2.0**-6  # |x| below: polynomials of degree 4, relative error 6e-8
LARGE = 8.0  # x above: p expm1(x) is q - p, as p may be 0 where q is not
GROUP = 32  # tokens per group whose maximum is kept for finding the top ids
RANKS = max(TOP_K) + 1


@dataclass(frozen=True)
class Grid:
    """How the vocabulary is cut: block boundaries, and the groups of columns inside the blocks.

    Group members are a stride apart (the first GROUP * width columns of a block), so that the maximum runs along rows
    of memory; what GROUP does not divide are groups of one.

    Attributes:
        bounds: ``[(start, stop), …]`` in order, without gaps.
        first, stride, count: ``[groups]`` each: first token id, distance of members, number of members.
    """

    bounds: tuple[tuple[int, int], ...]
    first: Tensor
    stride: Tensor
    count: Tensor

    @staticmethod
    def of(bounds: Sequence[tuple[int, int]], device: torch.device) -> Grid:
        """Cut blocks into groups."""
        rows = []
        for start, stop in bounds:
            width, rest = divmod(stop - start, GROUP)
            rows += [(start + g, width, GROUP) for g in range(width)]
            rows += [(stop - rest + r, 1, 1) for r in range(rest)]
        first, stride, count = torch.tensor(rows, device=device).unbind(1)
        return Grid(tuple(bounds), first, stride, count)

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.bounds[-1][1]

    def flat(self, ids: Tensor, positions: int) -> Tensor:
        """Where the logits of ``ids [positions, k]`` lie in a buffer of one ``[positions, width]`` block after the other."""
        edges = torch.tensor([b[0] for b in self.bounds] + [self.vocab], device=ids.device)
        block = torch.searchsorted(edges, ids, right=True) - 1
        start, width = edges[block], edges[block + 1] - edges[block]
        row = torch.arange(positions, device=ids.device)[:, None]
        return start * positions + row * width + ids - start


def group_maxima(x: Tensor) -> Tensor:
    """Maximum of each group of a block: ``[positions, width]`` -> ``[positions, groups]`` in the grid's order."""
    width = x.shape[1]
    whole = width // GROUP * GROUP
    strided = x[:, :whole].reshape(len(x), GROUP, whole // GROUP).amax(1)
    return strided if whole == width else torch.cat((strided, x[:, whole:]), 1)


def cap_pair(a: Tensor, d: Tensor, cap: float | None, work: Tensor) -> None:
    """Soft-cap in place: ``a`` raw logits -> capped, ``d`` raw difference -> difference of the capped logits."""
    if cap is None:
        return
    # where differences are large the identity would divide by almost 0: such positions are subtracted
    far = (torch.maximum(d.amax(-1), -d.amin(-1)) > cap / 2).nonzero()[:, 0]
    direct = (a[far] + d[far]).div_(cap).tanh_() if len(far) else None
    a.div_(cap).tanh_()
    d.div_(cap).tanh_()
    torch.mul(a, d, out=work).add_(1.0)
    torch.div(d, work, out=d)
    torch.mul(a, a, out=work).neg_().add_(1.0)
    d.mul_(work).mul_(cap)
    if direct is not None:
        d[far] = (direct - a[far]).mul_(cap)
    a.mul_(cap)


def total(x: Tensor) -> Tensor:
    """Sum over the last axis, the blocks' sums going on in float64."""
    return x.sum(-1).double()


class Sweep:
    """One tile: blocks of logits are added in the vocabulary's order, then the statistics are asked for.

    Args:
        grid: the cut of the vocabulary.
        positions: rows of the tile.
        buffers: two flat tensors of at least ``positions * vocab`` elements: first stream, and second or difference.
        work: four flat tensors of at least ``positions * widest block`` elements.
    """

    def __init__(
        self,
        grid: Grid,
        positions: int,
        buffers: tuple[Tensor, Tensor],
        work: Sequence[Tensor],
    ) -> None:
        self.grid, self.positions, self.buffers, self.work = grid, positions, buffers, work
        self.device = buffers[0].device
        self.wide: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.relative: list[bool] = []  # per block: the second buffer holds the difference
        self.max_a: list[Tensor] = []
        self.max_b: list[Tensor] = []
        self.sum_a: list[Tensor] = []
        self.sum_b: list[Tensor] = []
        self.near: list[Tensor] = []  # all differences of the position in the block are small
        self.gain: list[Tensor] = []  # there: sum exp(a - max) expm1(d - centre)
        self.top_a: list[Tensor] = []
        self.top_b: list[Tensor] = []
        # about what the second stream is above the first, [positions, 1]
        self.centre = torch.empty(0)
        self.low = torch.full((positions,), math.inf, **self.wide)
        self.high = torch.full((positions,), -math.inf, **self.wide)

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """First stream, and second or difference, of a block: ``[positions, width]`` each, to be filled or read."""
        start, stop = self.grid.bounds[index]
        part = slice(start * self.positions, stop * self.positions)
        one, two = (b[part].view(self.positions, stop - start) for b in self.buffers)
        return one, two

    def difference(self, index: int, out: Tensor) -> Tensor:
        """Second minus first stream of a block, in ``out`` where it is not at hand."""
        one, two = self.block(index)
        return two if self.relative[index] else torch.sub(two, one, out=out)

    def second(self, index: int, out: Tensor) -> Tensor:
        """Second stream of a block, in ``out`` where it is not at hand."""
        one, two = self.block(index)
        return torch.add(one, two, out=out) if self.relative[index] else two

    def scratch(self, width: int) -> list[Tensor]:
        """Work tensors ``[positions, width]``."""
        return [w[: self.positions * width].view(self.positions, width) for w in self.work]

    def add(self, index: int, relative: bool) -> None:
        """First pass over a block that was filled, its second buffer with the difference if ``relative``."""
        self.relative.append(relative)
        a, _ = self.block(index)
        w, t, u, v = self.scratch(a.shape[1])
        d, b = self.difference(index, u), self.second(index, v)
        low, high = d.amin(-1).double(), d.amax(-1).double()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.top_a.append(group_maxima(a))
        self.top_b.append(group_maxima(b))
        top_a, top_b = self.top_a[-1].amax(-1, keepdim=True), self.top_b[-1].amax(-1, keepdim=True)
        torch.sub(a, top_a, out=w).exp_()
        self.max_a.append(top_a[:, 0].double())
        self.sum_a.append(total(w))
        if not len(self.centre):
            self.centre = d.mean(-1, keepdim=True)
        centre = self.centre[:, 0].double()
        near = torch.maximum(centre - low, high - centre) < SMALL
        self.near.append(near)
        gain = torch.zeros_like(centre)
        if bool(near.any()):
            # sum w (t + t²/2), t = d - centre: exact where exp(b) - exp(a) would cancel
            torch.sub(d, self.centre, out=u)
            torch.mul(u, 0.5, out=t).add_(1.0).mul_(u).mul_(w)
            gain = total(t)
        self.gain.append(gain)
        peak, mass = self.max_a[-1] + centre, self.sum_a[-1] + gain
        if not bool(near.all()):
            direct = total(torch.sub(b, top_b, out=w).exp_())
            peak = torch.where(near, peak, top_b[:, 0].double())
            mass = torch.where(near, mass, direct)
        self.max_b.append(peak)
        self.sum_b.append(mass)

    def finish(self) -> dict[str, Tensor]:
        """The statistics of every position, ``[positions]`` each; see :class:`g2kit.model.logits_stats.Stats`."""
        lse_a, shift = self._normalise()
        sums = self._second_pass(lse_a, shift)
        vocab = self.grid.vocab
        # 0 but for rounding: what it is corrects the normalisation to second order
        s = sums["gain"]
        missed = torch.log1p(s)
        kl = sums["kl"] + (missed - s)
        reverse = (sums["reverse"] + s) / (1 + s) - missed
        mean_x = sums["x"] / vocab
        spread = (sums["x2"] / vocab - mean_x**2).clamp(min=0)
        shift = shift + missed
        return {
            "lse_ref": lse_a,
            "lse_cand": lse_a + shift,
            "kl": kl.clamp(min=0),
            "reverse_kl": reverse.clamp(min=0),
            "tv": sums["tv"] / 2,
            "max_diff": torch.maximum(-self.low, self.high),
            "mean_diff": shift - missed + mean_x,
            "rms_diff": spread.sqrt(),
            **self._tops(),
        }

    def targets(self, ids: Tensor, lse_ref: Tensor, lse_cand: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the target tokens under both streams; their difference keeps its digits."""
        flat = self.grid.flat(ids.clamp(min=0)[:, None], self.positions)[:, 0]
        a, b = (x[flat].double() for x in self.buffers)
        d = torch.where(self._relative(ids.clamp(min=0)), b, b - a)
        none = torch.full_like(a, math.nan)
        ref = a - lse_ref
        cand = ref + (d - (lse_cand - lse_ref))
        return torch.where(ids < 0, none, ref), torch.where(ids < 0, none, cand)

    def _normalise(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the first stream, and what the second's has more."""
        max_a, sum_a = torch.stack(self.max_a), torch.stack(self.sum_a)
        peak = max_a.amax(0)
        weight = (max_a - peak).exp()
        mass = (weight * sum_a).sum(0)
        lse_a = peak + mass.log()
        gain = torch.log1p((weight * torch.stack(self.gain)).sum(0) / mass)
        gain = gain + self.centre[:, 0].double()
        max_b, sum_b = torch.stack(self.max_b), torch.stack(self.sum_b)
        peak = max_b.amax(0)
        direct = peak + ((max_b - peak).exp() * sum_b).sum(0).log() - lse_a
        return lse_a, torch.where(torch.stack(self.near).all(0), gain, direct)

    def _second_pass(self, lse_a: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Sums over the vocabulary of the terms of both divergences, total variation, x and x²."""
        names = ("kl", "reverse", "tv", "gain", "x", "x2")
        sums = {name: torch.zeros(self.positions, **self.wide) for name in names}
        dtype = self.buffers[0].dtype
        centre_a = lse_a.to(dtype)[:, None]
        rest = (shift - self.centre[:, 0].double()).to(dtype)[:, None]
        centre_b = (lse_a + shift).to(dtype)[:, None]
        for index in range(len(self.grid.bounds)):
            a, _ = self.block(index)
            x, f, e, p = self.scratch(a.shape[1])
            torch.sub(self.difference(index, x), self.centre, out=x).sub_(
                rest
            )  # in two steps: a large shift stays exact
            torch.sub(a, centre_a, out=p).exp_()
            # f = p (expm1(x) - x), e = p expm1(x)
            torch.mul(x, 1 / 24, out=f).add_(1 / 6).mul_(x).add_(0.5).mul_(x).mul_(x)
            high = float(x.amax())
            if not max(high, -float(x.amin())) < SMALL:
                torch.expm1(x, out=e).sub_(x)
                torch.where(x.abs() < SMALL, f, e, out=f)
            torch.add(x, f, out=e).mul_(p)
            f.mul_(p)
            if not high < LARGE:
                q = (self.second(index, torch.empty_like(x)) - centre_b).exp_().sub_(p)
                large = x > LARGE
                torch.where(large, q, e, out=e)
                torch.where(large, q.sub_(p.mul_(x)), f, out=f)
            sums["kl"] += total(f)
            sums["gain"] += total(e)
            sums["tv"] += total(torch.abs(e, out=p))
            sums["reverse"] += total(e.mul_(x).sub_(f))
            sums["x"] += total(x)
            sums["x2"] += total(x.mul_(x))
        return sums

    def _tops(self) -> dict[str, Tensor]:
        """Top-1 ids, agreement, the first stream's margin, overlaps of the top k."""
        value_a, ids_a = self._top(torch.cat(self.top_a, 1), second=False)
        _, ids_b = self._top(torch.cat(self.top_b, 1), second=True)
        overlap = {
            f"overlap{k}": (ids_a[:, :k, None] == ids_b[:, None, :k]).sum((1, 2)).double()
            / min(k, self.grid.vocab)
            for k in TOP_K
        }
        return {
            "top1_ref": ids_a[:, 0],
            "top1_cand": ids_b[:, 0],
            "margin": value_a[:, 0] - value_a[:, 1],
            **overlap,
        }

    def _relative(self, ids: Tensor) -> Tensor:
        """Whether the second buffer holds a difference for these tokens."""
        edges = torch.tensor([b[1] for b in self.grid.bounds], device=self.device)
        kinds = torch.tensor(self.relative, device=self.device)
        return kinds[torch.searchsorted(edges, ids, right=True)]

    def _logits(self, ids: Tensor, second: bool) -> Tensor:
        """One stream's logits of ``ids [positions, k]``."""
        flat = self.grid.flat(ids, self.positions)
        a, b = (x[flat] for x in self.buffers)
        return torch.where(self._relative(ids), a + b, b) if second else a

    def _top(self, maxima: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        """The largest logits and their ids, ``[positions, k]``, descending, equal ones by ascending id."""
        grid = self.grid
        ranks = min(RANKS, grid.vocab)
        groups = maxima.topk(min(ranks, maxima.shape[1]), dim=1).indices
        member = torch.arange(GROUP, device=self.device)
        ids = grid.first[groups, None] + grid.stride[groups, None] * member
        real = (member < grid.count[groups, None]).flatten(1)
        ids = torch.where(real, ids.flatten(1), 0)
        value = self._logits(ids, second)
        value, order = value.masked_fill(~real, -math.inf).topk(ranks, dim=1)
        ids = ids.gather(1, order)
        # the order among equal logits is topk's whim: such rows are sorted in full
        tied = (value[:, 1:] == value[:, :-1]).any(1).nonzero()[:, 0].tolist()
        for row in tied:
            value[row], ids[row] = self._top_of_row(row, float(value[row, -1]), ranks, second)
        keep = min(max(TOP_K), grid.vocab)
        return value[:, :keep].double(), ids[:, :keep]

    def _top_of_row(
        self, row: int, least: float, ranks: int, second: bool
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for i, relative in enumerate(self.relative):
            a, b = (x[row] for x in self.block(i))
            parts.append((a + b if relative else b) if second else a)
        logits = torch.cat(parts)
        ids = (logits >= least).nonzero()[:, 0]
        value, order = logits[ids].sort(descending=True, stable=True)
        return value[:ranks], ids[order[:ranks]]
