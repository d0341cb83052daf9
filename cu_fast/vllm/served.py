"""The back half: the splices of one model in one process, the requests that are held, and the guard around the forward.

A forward that nothing was filled for raises, so no runner that this plug-in does not know serves anything; so does one in
which a layer did not run exactly once (a compiled graph of another process, a hook that was lost).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cu_fast import ops
from cu_fast.hf.places import Place
from cu_fast.hf.request import Request
from cu_fast.hf.topics import Layer, Topics
from cu_fast.masks import Mask
from cu_fast.nn import Splice
from cu_fast.vllm.admission import tag_of
from cu_fast.vllm.catalog import Catalog
from cu_fast.vllm.gating import fires
from cu_fast.vllm.modules import hook_for
from cu_fast.vllm.step import Rows

ATTRIBUTE = "_cu_fast"  # of the model, where the runners find it


@dataclasses.dataclass(eq=False)
class Held:
    """A request in this process.

    Attributes:
        request: keeps its rows in the tables.
        rows: per layer its row; -1 = nothing is deleted.
        names: of the masks that hold without a gate.
        open: names of those that are judged in the step that computes the prompt; none once that is done.
        prompt: tokens of its prompt.
        fired: names of those that were judged, and hold at a layer or more.
    """

    request: Request
    rows: list[int]
    names: list[str]
    open: tuple[str, ...]
    prompt: int
    fired: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Open:
    """A request whose prompt this step computes, and whose gates are judged in it: its tokens are start to stop."""

    held: Held
    start: int
    stop: int


class Served:
    """Everything of one model in one process.

    Args:
        catalog: masks and settings.
        parts: the attachment's name of a layer -> its splice, on its device, in evaluation mode.
        modules: the attachment's name of a layer -> that of the module in this model.
        max_tokens: that a step has at most, padding included.
    """

    def __init__(
        self, catalog: Catalog, parts: Mapping[str, Splice], modules: Mapping[str, str], max_tokens: int
    ) -> None:
        self.catalog, self.held = catalog, dict[str, Held]()
        self.layers = []
        for index, (name, splice) in enumerate(parts.items()):
            place, device = Place(modules[name]), next(iter(splice.buffers())).device
            skip = catalog.record.skip_first if splice.splice == "delta" else 0
            layer = Layer(name, splice, splice.new_table(device), place, place, skip)
            self.layers.append(ServedLayer(self, index, layer, Rows(max_tokens, skip, device)))
            self.layers[-1].warm_up()
        self.topics = Topics([one.layer for one in self.layers])
        for name, masks in catalog.masks.items():
            self.topics.add(masks, name, elsewhere=True)  # it was checked where the attachment was made
        self.open: list[Open] = []
        self.tokens: int | None = None  # of the forward that runs
        self._filled: int | None = None  # the same, from fill on until a forward takes it
        self._steps = self._computed = 0
        self._masked: collections.Counter[str] = collections.Counter()
        # Requests for the same masks share their rows as long as one of them is held; what is gated has rows of its own.
        self._requests: weakref.WeakValueDictionary[tuple[str, ...], Request] = weakref.WeakValueDictionary()

    # -- requests --------------------------------------------------------------------------------------------

    def hold(self, req_id: str, params: Any, prompt: int) -> Held:
        """A request's rows, kept until it is released.

        Args:
            req_id: the engine's.
            params: its SamplingParams, with the tag of admission.
            prompt: tokens of its prompt.

        Raises:
            RuntimeError: it did not pass admission, or wants masks that this process does not have.
        """
        if req_id not in self.held:
            names, digest = tag_of(params, req_id)
            known = all(name in self.catalog.masks for name in names)
            if not known or self.catalog.digest(names) != digest:
                raise RuntimeError(f"request {req_id} wants masks {list(names)} that this process does not have")
            self.held[req_id] = self._new(names, prompt)
        return self.held[req_id]

    def release(self, req_id: str) -> None:
        """Give up a request's rows, if it is held."""
        self.held.pop(req_id, None)

    def release_others(self, req_ids: Iterable[str]) -> None:
        """Give up the rows of all requests but these."""
        for gone in self.held.keys() - set(req_ids):
            self.release(gone)

    def _new(self, names: tuple[str, ...], prompt: int) -> Held:
        gated = tuple(name for name in names if name in self.catalog.gates)
        request = None if gated else self._requests.get(names)
        if request is None:
            request = self.topics.request(set(names) if names else None, gated=True)
            if not gated:
                self._requests[names] = request
        plain = [name for name in names if name not in gated]
        rows = [self._row(one, request, plain) if gated else self._whole(one, request) for one in self.layers]
        return Held(request, rows, plain, gated, prompt)

    @staticmethod
    def _whole(one: ServedLayer, request: Request) -> int:
        """A request's own row; -1 at a layer that none of its masks is for, so that a delta splice computes nothing there."""
        return request.rows[0] if one.layer.name in request.masks else -1

    def _row(self, one: ServedLayer, request: Request, names: Iterable[str]) -> int:
        mine = request.masks.get(one.layer.name, {})
        return self.topics.row_at(one.layer, [mine[name] for name in names if name in mine], request.held)

    # -- steps -----------------------------------------------------------------------------------------------

    def fill(self, held: Sequence[Held | None], computed: np.ndarray, counts: np.ndarray) -> None:
        """Say whose the tokens of the next forward are.

        Args:
            held: the requests in the order of their tokens; None = tokens that are no request's.
            computed: int, per request how many of its tokens were computed before.
            counts: int, per request its tokens in this step.
        """
        self.open = []
        stops = np.cumsum(counts)
        for one, at, stop, count in zip(held, computed, stops, counts):
            if one is None:
                continue
            if one.open:
                if at != 0 or count < one.prompt:
                    raise RuntimeError(
                        "the prompt of a request with gates was not computed in one step, and cannot be judged"
                    )
                self.open.append(Open(one, int(stop - count), int(stop)))
            for name in (*one.names, *one.fired):
                self._masked[name] += int(count)
        streams: set[Any] = set()
        for index, layer in enumerate(self.layers):
            rows = np.array([-1 if one is None else one.rows[index] for one in held], dtype=np.int32)
            layer.rows.fill(rows, computed, counts)
            layer.layer.table.read_on(layer.rows.tensor.device, streams)
        for one in held if streams else ():
            if one is not None:
                one.request.hold.streams |= streams  # a row is written again only when these have come past it
        self._filled = int(stops[-1])
        self._steps += 1
        self._computed += self._filled

    def fill_nothing(self) -> None:
        """Say that the tokens of the next forward, whatever their number, are no request's."""
        self.open = []
        for layer in self.layers:
            layer.rows.fill_nothing()
        self._filled = 0

    def before(self) -> None:
        """Begin a forward. Raises RuntimeError where nothing was filled."""
        if self._filled is None:
            raise RuntimeError(
                "the model was run by something that did not say whose tokens it computes; nothing is served"
            )
        self.tokens, self._filled = self._filled, None
        for layer in self.layers:
            layer.ran = 0

    def ended(self) -> None:
        """After a forward, whether it failed or not: nothing is filled."""
        self.tokens = None
        for layer in self.layers:
            layer.rows.clear()

    def after(self) -> None:
        """After a forward that did not fail. Raises RuntimeError where a layer did not run once."""
        for one in self.open:
            one.held.open = ()
        if missed := [layer.layer.name for layer in self.layers if layer.ran != 1]:
            raise RuntimeError(
                f"layers {missed} did not run once in this step; empty vLLM's compile cache, and report what the server was "
                f"started with"
            )

    def judge(self, index: int, x: Tensor) -> None:
        """Let the gates of a layer decide for the prompts of this step, x [T, d_in] being what the layer reads."""
        one = self.layers[index]
        for part in self.open:
            held = part.held
            begin = min(part.start + one.rows.skip_first, part.start + held.prompt)
            mine: dict[str, Mask] = held.request.masks.get(one.layer.name, {})
            prompt = x[begin : part.start + held.prompt]
            on = [
                name
                for name in held.open
                if name in mine and fires(one.layer.bottleneck, mine[name], self.catalog.gates[name], prompt)
            ]
            if on:
                held.rows[index] = self._row(one, held.request, [*held.names, *on])
                one.rows.set(held.rows[index], min(part.start + one.rows.skip_first, part.stop), part.stop)
                for name in set(on) - held.fired:
                    self._masked[name] += part.stop - part.start
                held.fired.update(on)

    def report(self) -> dict[str, Any]:
        """What ran: steps, tokens, masked_tokens by mask, requests held now, and the receipts of the layers."""
        return {
            "steps": self._steps,
            "tokens": self._computed,
            "masked_tokens": dict(self._masked),
            "held": len(self.held),
            "layers": {one.layer.name: one.layer.bottleneck.receipt() for one in self.layers},
        }


class ServedLayer:
    """A layer of the model: what the operator finds by its name.

    Args:
        served: that it is of.
        index: its number.
        layer: splice and mask table.
        rows: of the present step.
    """

    def __init__(self, served: Served, index: int, layer: Layer, rows: Rows) -> None:
        self.served, self.index, self.layer, self.rows, self.ran = served, index, layer, rows, 0

    def warm_up(self) -> None:
        """Run a token under a mask that deletes nothing: what cannot run, or has no room, fails at start."""
        splice, rows = self.layer.bottleneck, self.rows.tensor.new_zeros(1)
        self._spliced(torch.zeros(1, splice.d_in, device=rows.device), rows)
        splice.reset_receipt()

    def _spliced(self, x: Tensor, rows: Tensor) -> Tensor:
        tensors = self.layer.table.tensors
        masks = ops.LatentMasks(*tensors) if self.layer.bottleneck.splice == "delta" else tensors[0]
        return self.layer.bottleneck(x, masks, rows)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Change a layer's output in place.

        Args:
            hidden: [..., d_in], of at least the tokens of the step, padding behind them.
            residual: of the same shape; the output is the sum of both. None = it is hidden alone.

        Raises:
            RuntimeError: outside a step, or with fewer tokens than it has: a batch that is split.
        """
        T, splice = self.served.tokens, self.layer.bottleneck
        if T is None:
            raise RuntimeError(f"layer {self.layer.name!r} ran outside a forward that says whose tokens it computes")
        tokens = hidden.numel() // splice.d_in
        if hidden.shape[-1] != splice.d_in or not T <= tokens <= len(self.rows.tensor):
            raise RuntimeError(
                f"layer {self.layer.name!r} was given {list(hidden.shape)} in a step of {T} tokens, and its splice is for "
                f"width {splice.d_in}: tokens that are split or moved would have the masks of others"
            )
        self.ran += 1
        delta = splice.splice == "delta"
        if delta and not self.rows.masked and not self.served.open:
            return
        T = T or tokens  # 0 = profiling, where the time and memory of all counts
        hidden = hidden.view(-1, splice.d_in)[:T]
        residual = None if residual is None else residual.view(-1, splice.d_in)[:T]
        x = hidden if residual is None else hidden + residual
        if self.served.open:
            self.served.judge(self.index, x)
        if delta:
            if self.rows.masked:
                y = self._spliced(x, self.rows.tensor[:T])
                changed = (y != x).any(1, keepdim=True)  # NaN differs from itself
                hidden.copy_(torch.where(changed, y, hidden))
                if residual is not None:
                    residual.masked_fill_(changed, 0)
            return
        hidden.copy_(self._spliced(x, self.rows.tensor[:T]) if self.rows.masked else splice(x))
        if residual is not None:
            residual.zero_()


def served_in(runner: Any) -> Served | None:
    """Of the model that a runner has, whatever vLLM put around it; None = it serves without masks."""
    model = getattr(runner, "model", None)
    while model is not None and ATTRIBUTE not in vars(model):
        model = vars(model).get("runnable")  # CUDAGraphWrapper, UBatchWrapper
    return None if model is None else vars(model)[ATTRIBUTE]


def install(model: nn.Module, served: Served) -> None:
    """Put hooks on the layers of a model, and the guard around its forward."""
    for one in served.layers:
        name = one.layer.writes.module
        model.get_submodule(name).register_forward_hook(hook_for(name))
    forward = model.forward

    @functools.wraps(forward)
    def guarded(*args, **kwargs):
        served.before()
        try:
            output = forward(*args, **kwargs)
        finally:
            served.ended()
        served.after()
        return output

    model.forward = guarded
    setattr(model, ATTRIBUTE, served)
