"""From the names that a caller gives to rows of mask tables. Part of ``cu_fast.hf.attachment``; knows no models."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import unicodedata
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from cu_fast.hf.places import Place, near, same_place
from cu_fast.hf.request import KEPT, UNKNOWN_FILLING, Hold, Request, remember, signature_of
from cu_fast.masks import Mask, load_masks
from cu_fast.masks.tables import RowTable
from cu_fast.nn import Splice

Entry = str | Collection[str] | None  # what to delete for a sequence: a mask's name, the union of several, nothing

_numbers = itertools.count()


@dataclasses.dataclass
class Layer:
    """A swapped layer.

    Attributes:
        name: of the place that is changed, as in ``model.named_modules()``; one that is a module's input ends in ":in",
            and one that is read elsewhere begins with that place and " -> ".
        bottleneck: the splice that was attached.
        table: the masks in use, a row per request.
        reads: where it reads.
        writes: what it changes.
        skip_first: positions at the start of each sequence that masks leave alone.
        runner: number of the innermost model around the layer.
        in_encoder: it is in an encoder-decoder's encoder, which runs before generate() expands the batch.
        in_decoder: it runs in every step of generate().
        batch_first: it was seen to return [batch, tokens, width], by a batch with another number of tokens than
            sequences.
    """

    name: str
    bottleneck: Splice
    table: RowTable
    reads: Place
    writes: Place
    skip_first: int = 0
    runner: int = 0
    in_encoder: bool = False
    in_decoder: bool = False
    batch_first: bool = False


class Topics:
    """The masks of an attachment by name, and the table rows of those in use.

    A row has the same number in every layer's table. Requests with the same content share a row. A row is written again
    once no Hold of it is left and the streams that read it have come past that point.

    Args:
        layers: the swapped layers.

    Attributes:
        masks: name -> its masks, one per layer.
        always: names of masks that hold in every forward.
        erased: how many masks were erased.
        nothing: signature of a request that deletes nothing.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.masks: dict[str, tuple[Mask, ...]] = {}
        self.always: frozenset[str] = frozenset()
        self.erased = 0
        self._number = next(_numbers)
        self._name_nothing()
        self._layers = layers
        self._lock = threading.Lock()
        self._rows: dict[frozenset[str], list[int]] = {}  # layers and digests -> [row, number of Holds]
        self._made = 0  # rows that have ever been used
        self._free: list[tuple[int, list[Any]]] = []  # a row, and the CUDA events that writing it has to wait for
        # Of Holds that were freed: the keys of their rows, and the streams that read them.
        self._returned: collections.deque[tuple[list[frozenset[str]], set[Any]]] = collections.deque()

    def add(self, masks: Mask | Iterable[Mask], name: str | None, elsewhere: bool = False) -> str:
        """See ``Attachment.add_mask``."""
        masks = (masks,) if isinstance(masks, Mask) else tuple(masks)
        if name is None:
            topics = sorted({mask.topic for mask in masks})
            if len(topics) != 1:
                raise ValueError(f"the masks' topics are {topics}; give them one name")
            name = topics[0]
        if not isinstance(name, str) or not name or not masks:
            raise ValueError(f"name is {name!r} and there are {len(masks)} masks; neither should be empty")
        name = unicodedata.normalize("NFC", name)
        if name in self.masks:
            raise ValueError(f"there is a mask {name!r} already; remove it first, or give another name")
        if alike := [known for known in self.masks if _look(known) == _look(name)]:
            raise ValueError(f"name is {name!r}, which looks like that of the mask {alike[0]!r}; give another name")
        for mask in masks:
            layer = self.route(mask)
            layer.bottleneck.check_mask(mask)
            if not elsewhere and mask.layer is not None and not same_place(mask.layer, layer.name):
                raise ValueError(
                    f"mask {mask.topic!r} was found at layer {mask.layer!r}, and its codebook is at {layer.name!r} here; say "
                    f"elsewhere=True if it is meant for that place"
                )
            if mask.num_deleted == 0 and "erased" not in mask.method:
                raise ValueError(
                    f"mask {mask.topic!r} deletes no code; find it again with more texts or lower thresholds"
                )
        # A copy of the bits: writing to the caller's mask changes nothing here.
        self.masks[name] = tuple(dataclasses.replace(mask, bits=mask.bits.clone()) for mask in masks)
        return name

    def load(self, path: str | Path, name: str | None, elsewhere: bool = False) -> str:
        """See ``Attachment.load_mask``."""
        return self.add(load_masks(path), name, elsewhere)

    def remove(self, name: str) -> None:
        """See ``Attachment.remove_mask``."""
        name = self.known(name)
        if name in self.always:
            raise ValueError(f"mask {name!r} always holds; take it out of attachment.always first")
        del self.masks[name]

    def erase(self, name: str) -> None:
        """Remove a mask's codes from their codebooks for good; the other masks are renumbered to what remains."""
        name = self.known(name)
        if kept := [layer.name for layer, _ in self._route_again(name) if layer.bottleneck.splice == "delta"]:
            raise RuntimeError(
                f"mask {name!r} is for {', '.join(kept)}, whose splice keeps the hidden state: the model's weights still "
                f"hold the topic, and there is nothing to erase it from. A mask that always holds deletes it from what "
                f"the model computes"
            )
        for layer, mask in self._route_again(name):  # all checks before the first codebook changes
            if (left := mask.num_codes - mask.num_deleted) < (k := layer.bottleneck.config.k):
                raise ValueError(
                    f"erasing mask {name!r} leaves layer {layer.name!r} {left} codes; k = {k} should remain"
                )
        for i in range(len(self.masks[name])):
            layer, mask = self._route_again(name)[i]  # renumbered, where layers share a codebook
            before = mask.codebook_sha256
            kept = layer.bottleneck.erase(mask.ids())
            after = layer.bottleneck.codebook_sha256()
            layer.table = layer.bottleneck.new_table(layer.bottleneck.codebook.codes.device)
            for other, masks in self.masks.items():
                self.masks[other] = tuple(
                    m.after_erasing(kept, after) if m.codebook_sha256 == before else m for m in masks
                )
        del self.masks[name]
        self.always -= {name}
        self.erased += 1
        self._name_nothing()

    def _name_nothing(self) -> None:
        """Make the signature of a request that deletes nothing, for this attachment and its codes as they are now.

        A state that another attachment computed without masks, or this one before codes were erased, must not match.
        """
        self.nothing = signature_of(["nothing", self._number, self.erased])
        KEPT[self.nothing] = "no mask, after codes were erased" if self.erased else "no mask"

    @property
    def unstamped(self) -> int:
        """The signature that a state without a stamp counts as: no masks, or unknown once codes were erased."""
        return UNKNOWN_FILLING if self.erased else self.nothing

    def route(self, mask: Mask) -> Layer:
        """The layer that a mask is for.

        Raises:
            ValueError: no layer has its codebook, or several have and none of them is ``mask.layer``.
        """
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
        """For a report: name, digest and number of deleted codes of each mask that is for a layer."""
        return [
            {"name": name, "digest": mask.digest, "deleted": mask.num_deleted}
            for name, masks in self.masks.items()
            for mask in masks
            if mask.codebook_sha256 == layer.bottleneck.codebook_sha256() and self.route(mask) is layer
        ]

    def request(self, topics: Entry | list[Entry], gated: bool = False) -> Request:
        """The request for what ``unlearn`` was given. Its rows are written, and kept as long as its Hold is referenced.

        Raises:
            ValueError: an unknown name, an empty list or collection.
            TypeError: topics that are not names.
            RuntimeError: a codebook changed since its mask was added.
        """
        if isinstance(topics, tuple):
            raise TypeError(f"topics is the tuple {topics!r}; give a list, an entry per sequence, or a set, a union")
        by_sequence = isinstance(topics, list)
        entries = [self._names(entry) for entry in (topics if by_sequence else [topics])]
        if not entries:
            raise ValueError("unlearn() was given an empty list; give an entry for each sequence, or None")
        for layer in self._layers if any(entries) else ():
            layer.bottleneck.refresh()
        routed = {name: self._route_again(name) for name in sorted(set().union(*entries))}
        wanted = [[pair for name in names for pair in routed[name]] for names in entries]
        keys = [frozenset(f"{layer.name} {mask.digest}" for layer, mask in masks) for masks in wanted]
        codebooks = {layer.name: mask.codebook_sha256 for masks in wanted for layer, mask in masks}
        text = ", ".join(" + ".join(names) or "nothing" for names in entries)
        signature = self._sign(keys, f"{text}, gated" if gated else text, gated)
        hold, held = self.hold()
        with self._lock, torch.inference_mode(False):
            rows = tuple(self._acquire(key, masks, held) for key, masks in zip(keys, wanted))
        beyond = not set().union(*entries) <= self.always
        masks: dict[str, dict[str, Mask]] = {}
        for name, pairs in routed.items() if gated else ():
            for layer, mask in pairs:
                masks.setdefault(layer.name, {})[name] = mask
        return Request(
            rows, "sequence" if by_sequence else "all", signature, codebooks, hold, keys, names=entries, gated=gated,
            masks=masks, always=self.always, held=held, beyond=beyond,
        )  # fmt: skip

    def row_at(self, layer: Layer, masks: list[Mask], held: list[frozenset[str]]) -> int:
        """The row of a union of masks at one layer, kept as long as the Hold of ``held``; -1 for no masks."""
        key = frozenset(f"{layer.name} {mask.digest}" for mask in masks)
        with self._lock, torch.inference_mode(False):
            if key in self._rows and key in held:
                return self._rows[key][0]
            return self._acquire(key, [(layer, mask) for mask in masks], held)

    def share(self, request: Request, entry: int) -> Request:
        """One entry of an open request as a request of its own, with its own Hold."""
        key = request.keys[entry]
        hold, held = self.hold()
        with self._lock:
            row = self._acquire(key, [], held)  # it is there: the open request holds it
        signature = self._sign([key], "a request")
        return Request((row,), "all", signature, request.codebooks, hold, [key], beyond=request.beyond)

    def hold(self) -> tuple[Hold, list[frozenset[str]]]:
        """A Hold, and the list of keys whose rows are given back when it is freed, even if no request is made."""
        hold: Hold = Hold()
        held: list[frozenset[str]] = []
        weakref.finalize(hold, self._returned.append, (held, hold.streams))
        return hold, held

    def after_fork(self) -> None:
        """In the new process: locks that another thread of the old process held are free."""
        self._lock = threading.Lock()
        for layer in self._layers:
            layer.table.after_fork()
            layer.bottleneck.after_fork()

    def _names(self, entry: Entry) -> tuple[str, ...]:
        if entry is None:
            return tuple(sorted(self.always))
        names = (entry,) if isinstance(entry, str) else tuple(entry) if isinstance(entry, Collection) else None
        if names is None or not all(isinstance(name, str) for name in names):
            raise TypeError(f"an entry of unlearn() is {entry!r}; it should be a mask's name, several, or None")
        if not names:
            raise ValueError("an entry of unlearn() is an empty collection; say None to delete nothing")
        return tuple(sorted({*map(self.known, names), *self.always}))

    def known(self, name: str) -> str:
        """A mask's name as it is kept, in Unicode's form NFC. Raises ValueError where there is no such mask."""
        name = unicodedata.normalize("NFC", name)
        if name not in self.masks:
            raise ValueError(f"there is no mask {name!r}; {near(name, self.masks)}")
        return name

    def _route_again(self, name: str) -> list[tuple[Layer, Mask]]:
        try:
            return [(self.route(mask), mask) for mask in self.masks[name]]
        except ValueError as error:
            raise RuntimeError(
                f"a codebook changed since mask {name!r} was added (it was trained, or cast to another dtype): {error}"
            ) from error

    def _acquire(self, key: frozenset[str], masks: list[tuple[Layer, Mask]], held: list[frozenset[str]]) -> int:
        if not key:
            return -1
        self._take_back()
        if key not in self._rows:
            values = [
                layer.bottleneck.row_of([mask for other, mask in masks if other is layer]) for layer in self._layers
            ]
            if not self._free:  # counted first: after an interrupt a row may be lost, but never has two masks
                self._made += 1
            row, events = self._free.pop() if self._free else (self._made - 1, [])
            try:
                for layer, value in zip(self._layers, values):
                    layer.table.write(row, value, after=events)
            except BaseException:
                self._free.append((row, events))
                raise
            self._rows[key] = [row, 0]
        self._rows[key][1] += 1
        held.append(key)
        return self._rows[key][0]

    def _take_back(self) -> None:
        # Finalizers run at any moment, in any thread, and so must not take the lock: they leave rows here.
        while self._returned:
            keys, streams = self._returned.popleft()
            events = [stream.record_event() for stream in streams]
            for key in keys:
                self._rows[key][1] -= 1
                if self._rows[key][1] == 0:
                    self._free.append((self._rows.pop(key)[0], events))

    def _sign(self, held: list[frozenset[str]], text: str, gated: bool = False) -> int:
        """The signature: a hash of each sequence's mask digests and of the layers' splices and mask modes."""
        if not any(held):
            return self.nothing
        content = [sorted(digests) for digests in held]
        if all(digests == content[0] for digests in content):
            content = content[:1]  # the same masks for every sequence: one signature, whatever their number
        modes = [v.bottleneck.mask_mode if v.bottleneck.splice == "replace" else "delta" for v in self._layers]
        skips = [layer.skip_first for layer in self._layers]
        signature = signature_of([content, modes, skips, *(["gated"] if gated else [])])
        remember(signature, f"{text} ({'/'.join(dict.fromkeys(modes))}, {f'{signature:016x}'[:8]})")
        return signature


def _look(name: str) -> str:
    """What a name looks like: without signs that are not seen, and with one form of those that look the same."""
    seen = (sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
    return " ".join("".join(seen).split())
