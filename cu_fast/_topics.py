"""From the names that a caller gives to rows of mask tables: the half of ``cu_fast.hf`` that knows masks, not models."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cu_fast.masks import Mask, MaskTable
from cu_fast.nn import CodebookBottleneck

NOTHING = 0  # the signature of a request that deletes nothing
_TEXT = {NOTHING: "no mask"}  # signature -> what messages call it


@dataclasses.dataclass
class Layer:
    """A swapped layer. ``runner`` numbers the model that runs it."""

    name: str
    bottleneck: CodebookBottleneck
    table: MaskTable
    runner: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """What one ``unlearn`` context deletes.

    rows: a row of every layer's mask table for each sequence of the batch, -1 = nothing; one row, for every
    sequence, unless ``per_sequence``. signature: a number for what is deleted, by content and not by name;
    NOTHING where no row deletes. codebooks: layer -> sha256 that its masks were made for. held: what
    :meth:`Topics.release` gives back.
    """

    rows: tuple[int, ...]
    per_sequence: bool
    signature: int
    codebooks: dict[str, str]
    held: list[frozenset[str]]


class Topics:
    """The masks of an attachment by name, and the table rows of those in use.

    A row has the same number in every layer's table. Rows are shared by content, counted, and used again.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.masks: dict[str, tuple[Mask, ...]] = {}
        self._layers = layers
        self._lock = threading.Lock()
        self._rows: dict[frozenset[str], list[int]] = {}  # layers and digests -> [row, holders]
        self._free: list[int] = []

    def add(self, masks: Mask | Iterable[Mask], name: str | None) -> str:
        masks = (masks,) if isinstance(masks, Mask) else tuple(masks)
        if name is None:
            topics = sorted({mask.topic for mask in masks})
            if len(topics) != 1:
                raise ValueError(f"the masks' topics are {topics}; give them one name")
            name = topics[0]
        if not isinstance(name, str) or not name or not masks:
            raise ValueError(f"name is {name!r} and there are {len(masks)} masks; neither should be empty")
        if name in self.masks:
            raise ValueError(f"there is a mask {name!r} already; remove it first, or give another name")
        for mask in masks:
            self.route(mask)
        self.masks[name] = masks
        return name

    def load(self, path: str | Path, name: str | None) -> str:
        parts = sorted(part for part in Path(path).glob("*") if part.is_dir())
        return self.add([Mask.load(part) for part in parts] or Mask.load(path), name)

    def remove(self, name: str) -> None:
        self._check_name(name)
        del self.masks[name]

    def erase(self, name: str) -> None:
        """Remove a mask's codes from their codebooks for good; the other masks move to what remains."""
        self._check_name(name)
        for layer, mask in self._route_again(name):
            before = mask.codebook_sha256
            kept = layer.bottleneck.erase(mask.ids())
            after = layer.bottleneck.codebook_sha256()
            layer.table = MaskTable(len(kept), layer.bottleneck.codebook.codes.device)
            for other, masks in self.masks.items():
                self.masks[other] = tuple(
                    m.after_erasing(kept, after) if m.codebook_sha256 == before else m for m in masks
                )
        del self.masks[name]

    def route(self, mask: Mask) -> Layer:
        """The layer that a mask is for. Raises ValueError where its codebook is none of the layers', or several's."""
        matches = [v for v in self._layers if v.bottleneck.codebook_sha256() == mask.codebook_sha256]
        if len(matches) > 1:
            matches = [layer for layer in matches if layer.name == mask.layer]
            if not matches:
                raise ValueError(f"mask {mask.topic!r} is for layer {mask.layer!r}, and other layers have its codebook")
        if not matches:
            have = ", ".join(f"{v.name}: {v.bottleneck.codebook_sha256()[:12]}..." for v in self._layers)
            raise ValueError(
                f"mask {mask.topic!r} was made for another codebook (sha256 {mask.codebook_sha256[:12]}...; here "
                f"are {have}); find it again on this one"
            )
        return matches[0]

    def known_for(self, layer: Layer) -> list[dict[str, Any]]:
        """For a report: name, digest and number of deleted codes of the masks for one layer."""
        return [
            {"name": name, "digest": mask.digest, "deleted": mask.num_deleted}
            for name, masks in self.masks.items()
            for mask in masks
            if mask.codebook_sha256 == layer.bottleneck.codebook_sha256() and self.route(mask) is layer
        ]

    def request(self, topics: Any) -> Request:
        """Read what ``unlearn`` was given and hold the rows for it, until :meth:`release`.

        Raises:
            ValueError: an unknown name, an empty list. RuntimeError: a codebook changed since its mask was added.
        """
        per_sequence = isinstance(topics, (list, tuple))
        entries = [self._names(entry) for entry in (topics if per_sequence else [topics])]
        if not entries:
            raise ValueError("unlearn() was given an empty list; give an entry for each sequence, or None")
        routed = {name: self._route_again(name) for name in sorted(set().union(*entries))}
        wanted = [[pair for name in names for pair in routed[name]] for names in entries]
        held = [frozenset(f"{layer.name} {mask.digest}" for layer, mask in masks) for masks in wanted]
        codebooks = {layer.name: mask.codebook_sha256 for masks in wanted for layer, mask in masks}
        signature = self._sign(held, ", ".join(" + ".join(names) or "nothing" for names in entries))
        with self._lock, torch.inference_mode(False):
            rows = tuple(self._acquire(key, masks) for key, masks in zip(held, wanted))
        return Request(rows, per_sequence, signature, codebooks, held)

    def release(self, request: Request) -> None:
        with self._lock:
            for key in filter(None, request.held):
                self._rows[key][1] -= 1
                if self._rows[key][1] == 0:
                    self._free.append(self._rows.pop(key)[0])

    def _names(self, entry: Any) -> tuple[str, ...]:
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(sorted(entry))
        if entry is not None and not names:
            raise ValueError("an entry of unlearn() is an empty collection; say None to delete nothing")
        for name in names:
            self._check_name(name)
        return names

    def _check_name(self, name: str) -> None:
        if name not in self.masks:
            raise ValueError(f"there is no mask {name!r}; {near(name, self.masks)}")

    def _route_again(self, name: str) -> list[tuple[Layer, Mask]]:
        try:
            return [(self.route(mask), mask) for mask in self.masks[name]]
        except ValueError as error:
            raise RuntimeError(
                f"a codebook changed since mask {name!r} was added (it was trained, or cast to another dtype): {error}"
            ) from error

    def _acquire(self, key: frozenset[str], masks: list[tuple[Layer, Mask]]) -> int:
        if not key:
            return -1
        if key not in self._rows:
            row = self._free.pop() if self._free else len(self._rows)
            for layer in self._layers:
                bits = torch.zeros(layer.table.table.shape[1], dtype=torch.int32)
                for _, mask in (pair for pair in masks if pair[0] is layer):
                    bits |= mask.bits
                layer.table.write(row, bits)
            self._rows[key] = [row, 0]
        self._rows[key][1] += 1
        return self._rows[key][0]

    def _sign(self, held: list[frozenset[str]], text: str) -> int:
        """The signature: for each sequence the digests of its masks, and what a mask does."""
        if not any(held):
            return NOTHING
        content = [sorted(digests) for digests in held]
        if all(digests == content[0] for digests in content):
            content = content[:1]  # the same for every sequence, however many there are
        modes = [layer.bottleneck.mask_mode for layer in self._layers]
        digest = hashlib.sha256(json.dumps([content, modes]).encode()).digest()
        signature = int.from_bytes(digest[:8], "big") >> 1 or 1
        _TEXT[signature] = f"{text} ({'/'.join(dict.fromkeys(modes))}, {digest.hex()[:8]})"
        return signature


def text_of(signature: int) -> str:
    """What to call a request in a message."""
    return _TEXT.get(signature, "the masks of another process")


def near(name: str, names: Iterable[str]) -> str:
    """For a message about an unknown name: which known ones are like it."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=5, cutoff=0.5):
        return f"near names: {', '.join(close)}"
    return f"there are: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else "there are none"
