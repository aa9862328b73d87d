"""Which token sequences a comparison runs: chosen so that every part of a Gemma 2 that can go wrong is used.

A comparison of four tokens misses most real faults: the sliding window, the order of local and global layers, soft-caps
and RoPE show only in longer sequences. Groups: ``P0`` BOS and three tokens; ``P1`` snippets in many scripts; ``P2`` documents,
the statistical sample; ``P3`` lengths around the sliding window; ``P4`` a long sequence, the full context where the
profile allows; ``P10`` every vocabulary row as input. All of these are compared. P5 to P9 (soft-caps, batch and padding,
BOS, decoding, greedy choice) are checks of :mod:`.behaviour` on the tokens of these groups.

The ids depend on configuration, tokenizer, profile, seed and the user's texts only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats.errors import TokenizerError, UsageError
from ..model.config import GemmaConfig
from ..model.sample import heldout_text
from .profiles import CHUNK, DEFAULT_PROFILE, PROFILES, Profile, is_small
from .text_probes import Text, documents, snippets, user_text, user_tokens
from .tokenizer import SentencePieceTokenizer, Tokenizer, tokenizer_of

__all__ = [
    "PROFILES", "Probe", "ProbeSet", "Profile", "SentencePieceTokenizer", "Tokenizer", "build_probes",
    "is_small", "tokenizer_of",
]  # fmt: skip

Ids = npt.NDArray[np.int64]
# group -> what it is, for people
GROUPS = {
    "P0": "BOS and three tokens", "P1": "snippets in many scripts", "P2": "documents",
    "P3": "lengths around the sliding window", "P4": "a long sequence up to the full context",
    "P10": "every vocabulary row as input",
}  # fmt: skip
WINDOW_LENGTHS = (-1, 0, 1, 2, 64)  # P3: lengths relative to the window
OWN_DOCUMENTS = 8  # pieces that a user's text is cut into at least: fewer give no interval
TOKEN_CHARACTERS = 64  # of a text per token wanted; Gemma's longest token has 31 spaces


@dataclass(frozen=True, eq=False)
class Probe:
    """One token sequence.

    Attributes:
        id: ``group/name``, unique in its set.
        group: ``P0`` to ``P4``, ``P10``.
        category: kind of content.
        document: what it was cut from.
        tokens: ids ``[length]``, BOS first except in ``--tokens``.
        text: the text it is the beginning of, None for ids without one.
        scored: whether its next tokens are text, so that their probability means something.
    """

    id: str
    group: str
    category: str
    document: str
    tokens: Ids
    text: str | None = field(repr=False)
    scored: bool


@dataclass(frozen=True)
class ProbeSet:
    """What a comparison runs; iterates over its probes.

    Attributes:
        probes: in order of groups.
        profile: ``smoke``, ``ci`` or ``full``.
        seed: of the pseudo-random ids.
        skipped: ``{"group", "why"}`` of what the profile, the model or a missing tokenizer left out.
    """

    probes: tuple[Probe, ...]
    profile: str
    seed: int
    skipped: list[dict[str, str]]

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(p.tokens) for p in self.probes)

    def group(self, *names: str) -> list[Probe]:
        """The probes of some groups."""
        return [p for p in self.probes if p.group in names]

    @cached_property
    def sha256(self) -> str:
        """Hash of every id of every probe, in order."""
        digest = hashlib.sha256(b"g2kit probes v1\0")
        for p in self.probes:
            digest.update(f"{p.id}\0{len(p.tokens)}\0{int(p.scored)}\0".encode())
            digest.update(p.tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def build_probes(
    config: GemmaConfig,
    tokenizer: Tokenizer | None,
    profile: str = DEFAULT_PROFILE,
    *,
    text: str | Path | None = None,
    tokens: str | Path | npt.ArrayLike | None = None,
    seed: int = 0,
) -> ProbeSet:
    """The probes of a model.

    Args:
        config: the model; lengths follow its window and context.
        tokenizer: the model's own; None leaves pseudo-random ids, and P2 is skipped.
        profile: a name of :data:`PROFILES`.
        text: a UTF-8 file that replaces the built-in P2 documents, cut into pieces of the profile's length.
        tokens: a ``.npy`` file or array of ids ``[length]`` or ``[documents, length]`` that replaces them, taken as is.
        seed: of the pseudo-random ids.

    Raises:
        UsageError: unknown profile; text without a tokenizer, or with tokens; ids that do not fit the model.
        TokenizerError: the tokenizer gives ids that the model's vocabulary does not have.
        G2Error: a file cannot be read.
    """
    if profile not in PROFILES:
        raise UsageError(
            f"no profile is called {profile!r}.", fix=f"use one of {', '.join(PROFILES)}."
        )
    if text is not None and tokens is not None:
        raise UsageError("text and tokens are both given.", fix="give one of them.")
    if text is not None and tokenizer is None:
        raise UsageError(
            "a text needs a tokenizer, and the checkpoint has none.",
            fix="put tokenizer.model beside the checkpoint, or give token ids.",
        )
    size = PROFILES[profile][0 if is_small(config) else 1]
    b = _Builder(config, tokenizer, profile, size, seed)
    b.smoke()
    b.snippets()
    if text is not None:
        b.own_text(user_text(text))
    elif tokens is not None:
        b.own_tokens(user_tokens(tokens))
    else:
        b.documents()
    b.edges()
    b.long()
    b.rows()
    return ProbeSet(tuple(b.probes), profile, seed, b.skipped)


class _Builder:
    """Collects probes and what was left out."""

    def __init__(
        self,
        config: GemmaConfig,
        tokenizer: Tokenizer | None,
        profile: str,
        size: Profile,
        seed: int,
    ) -> None:
        self.config, self.tokenizer, self.size, self.seed = config, tokenizer, size, seed
        self.context, self.profile = config.max_position_embeddings, profile
        self.probes: list[Probe] = []
        self.skipped: list[dict[str, str]] = []

    def skip(self, group: str, why: str) -> None:
        self.skipped.append({"group": group, "why": why})

    def add(
        self,
        group: str,
        name: str,
        category: str,
        document: str,
        ids: Iterable[int],
        text: str | None,
    ) -> None:
        """A probe; the context bounds its length."""
        tokens = np.array([self.config.bos_token_id, *ids], np.int64)[: self.context]
        self.put(group, name, category, document, tokens, text, text is not None)

    def put(
        self,
        group: str,
        name: str,
        category: str,
        document: str,
        ids: Ids,
        text: str | None,
        scored: bool,
    ) -> None:
        ids.flags.writeable = False
        self.probes.append(Probe(f"{group}/{name}", group, category, document, ids, text, scored))

    def encode(self, text: Text, limit: int) -> list[int]:
        """Ids of the beginning of a text."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(text.text[: TOKEN_CHARACTERS * limit])[:limit]
        vocab = self.config.vocab_size
        for at, i in enumerate(ids):
            if not 0 <= i < vocab:
                raise TokenizerError(
                    f"token {at} of {text.name} has id {i}; the model's vocabulary has {vocab}.",
                    fix="use the tokenizer of this very model.",
                )
        return ids

    @cached_property
    def usable(self) -> Ids:
        """Ids that may stand anywhere in a sequence: all but the special ones."""
        c = self.config
        special = [c.bos_token_id, c.pad_token_id, *c.eos_token_id]
        found = np.setdiff1d(np.arange(c.vocab_size), special)
        return found if len(found) else np.zeros(1, np.int64)

    def noise(self, name: str, count: int) -> list[int]:
        """Pseudo-random ids, the same on every machine and version."""
        words = _random_words(f"{self.seed}/{name}", count)
        picked = self.usable[(words % np.uint64(len(self.usable))).astype(np.int64)]
        return [int(i) for i in picked]

    def smoke(self) -> None:
        """P0: BOS and three tokens."""
        if self.tokenizer is None:
            self.add("P0", "4", "random ids", "P0", self.noise("P0", 3), None)
        else:
            first = snippets()[0]
            self.add("P0", "4", "english", first.name, self.encode(first, 3), first.text)

    def snippets(self) -> None:
        """P1: short texts in many scripts."""
        room = self.size.snippet - 1
        for i, t in enumerate(snippets()):
            name = t.name.split("/")[1]
            if self.tokenizer is None:
                self.add("P1", str(i), "random ids", f"P1/{i}", self.noise(f"P1/{i}", room), None)
            else:
                self.add("P1", name, name, t.name, self.encode(t, room), t.text)

    def documents(self) -> None:
        """P2: the built-in documents."""
        if not self.size.documents:
            self.skip("P2", f"the {self.profile} profile has no documents.")
        elif self.tokenizer is None:
            self.skip("P2", "the checkpoint carries no tokenizer, so there is no text to read.")
        else:
            chosen = documents()[: self.size.documents]
            for t in chosen:
                self.add(
                    "P2", t.name, t.category, t.name, self.encode(t, self.size.document - 1), t.text
                )
            if len(chosen) < len(documents()):
                self.skip("P2", f"{len(chosen)} of {len(documents())} documents: the {self.profile} profile "
                                "keeps large models to few tokens.")  # fmt: skip

    def own_text(self, text: Text) -> None:
        """P2: the user's text, in pieces of the profile's length or shorter; each is a document."""
        length = self.size.document or self.size.snippet
        step = max(1, min(length, self.context) - 1)
        most = self.size.documents or CHUNK // length
        ids = self.encode(text, most * step + 1)
        room = max(1, min(self.size.snippet, self.context) - 1)
        step = min(step, max(room, -(-len(ids) // OWN_DOCUMENTS)))
        for i in range(0, min(len(ids), most * step), step):
            name = f"{text.name}:{i}"
            self.add("P2", name, text.category, name, ids[i : i + step], text.text)
        if len(ids) > most * step:
            self.skip(
                "P2",
                f"{text.name} after its first {most * step} tokens: the {self.profile} profile.",
            )

    def own_tokens(self, rows: list[Ids]) -> None:
        """P2: the user's ids, as they are."""
        for i, ids in enumerate(rows):
            wrong = np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))
            if len(wrong):
                raise UsageError(
                    f"token id {ids[wrong[0]]} of document {i}, position {wrong[0]} is outside the vocabulary of "
                    f"{self.config.vocab_size}.",
                    fix=f"give ids from 0 to {self.config.vocab_size - 1}, made by this model's tokenizer.",
                )
            if len(ids) > self.context:
                raise UsageError(
                    f"document {i} has {len(ids)} tokens, the model's context {self.context}.",
                    fix="cut it into rows of at most that length.",
                )
            begins = ids[0] == self.config.bos_token_id
            category = "tokens" if begins else "tokens without BOS"
            self.put("P2", f"tokens:{i}", category, f"tokens:{i}", ids.copy(), None, True)

    def edges(self) -> None:
        """P3: lengths around the window."""
        window = self.config.sliding_window
        if window is None:
            self.skip("P3", "the model has no sliding window.")
            return
        lengths = sorted({min(window + d, self.context) for d in WINDOW_LENGTHS if window + d > 1})
        if lengths and lengths[-1] <= window:
            self.skip(
                "P3", f"the context of {self.context} does not reach past the window of {window}."
            )
        if not self.size.every_edge and lengths:
            self.skip(
                "P3",
                f"lengths {', '.join(map(str, lengths[:-1]))}: the {self.profile} profile runs the longest only.",
            )
            lengths = lengths[-1:]
        for n in lengths:
            self.stretch("P3", n, "boundary")

    def long(self) -> None:
        """P4: the full context, or as much of it as the profile allows."""
        n = min(self.context, self.size.long)
        reached = max((len(p.tokens) for p in self.probes if p.group == "P3"), default=0)
        if n <= reached:
            if self.context > reached:
                self.skip(
                    "P4",
                    f"the {self.profile} profile does not run the full context of {self.context}.",
                )
            return
        self.stretch("P4", n, "full context" if n == self.context else "long")
        if n < self.context:
            self.skip(
                "P4",
                f"{n} of the {self.context} positions of the context: the {self.profile} profile.",
            )

    @cached_property
    def long_ids(self) -> list[int]:
        """A long natural text, repeated where the context is longer still."""
        text = Text("sample/heldout", "long", heldout_text())
        ids = self.encode(text, self.context)
        return (ids * (self.context // max(1, len(ids)) + 1))[: self.context]

    def stretch(self, group: str, length: int, category: str) -> None:
        """A sequence of exactly ``length`` tokens."""
        name = f"{group}/{length}"
        if self.tokenizer is None:
            self.add(group, str(length), category, name, self.noise(group, length - 1), None)
        else:
            ids = self.long_ids[: length - 1]
            self.add(group, str(length), category, "sample/heldout", ids, heldout_text())

    def rows(self) -> None:
        """P10: vocabulary rows in pseudo-random order, each once."""
        vocab = self.config.vocab_size
        most = min(self.size.rows, vocab)
        if most < vocab:
            self.skip(
                "P10",
                f"{vocab - most} of {vocab} vocabulary rows as input: the {self.profile} profile.",
            )
        order = np.argsort(_random_words(f"{self.seed}/P10", vocab), kind="stable")
        if most < vocab:  # the special and unused ids at both ends are the likeliest to be shifted
            ends = np.concatenate([np.arange(most // 4), np.arange(vocab - most // 4, vocab)])
            kept = np.concatenate([ends, order[~np.isin(order, ends)]])[:most]
            order = kept[np.argsort(_random_words(f"{self.seed}/P10/{most}", most), kind="stable")]
        step = max(1, min(CHUNK // 2, self.context - 1))
        for i in range(0, most, step):
            part = [int(t) for t in order[i : i + step]]
            self.add("P10", str(i), "vocabulary rows", f"P10/{i}", part, None)


def _random_words(name: str, count: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random 64-bit words from SHAKE-128, which no library version changes."""
    data = hashlib.shake_128(f"g2kit probes v1/{name}".encode()).digest(8 * count)
    return np.frombuffer(data, "<u8").astype(np.uint64)


def describe(probes: ProbeSet) -> list[dict[str, Any]]:
    """The report's list of probes."""
    return [
        {
            "id": p.id, "group": p.group, "category": p.category, "tokens": len(p.tokens),
            "max_position": len(p.tokens) - 1,
        }
        for p in probes
    ]  # fmt: skip
