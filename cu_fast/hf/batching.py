"""transformers' continuous batching, with a mask for each request. Part of ``cu_fast.hf.attachment``.

A manager runs the model in a thread of its own, on the tokens of many requests, packed as [1, tokens]. The masks that
hold where a request is added are kept with it until it ends. Before each forward the mask rows of the packed tokens are
put together, in the manager's thread.

A manager may share the keys and values of prompts that begin alike. Under different masks these differ, so sharing is
off while bottlenecks are attached. So are CUDA graphs, whose replay would not look masks up.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import transformers
from torch import nn
from transformers.generation import ContinuousBatchingConfig

from cu_fast.hf.active import Active
from cu_fast.hf.request import Request
from cu_fast.hf.sites import replace_attribute

# The methods of a manager that are replaced, and the attributes that are read. A version of transformers that lacks one
# batches in another way, and is refused.
REPLACED = (
    "add_request",
    "add_requests",
    "warmup",
    "_generation_step",
    "_generation_loop_body",
    "_run_generation_loop",
)
READ = ("batch_processor", "_request_lock", "_request_counter", "_use_prefix_sharing")


def wrap_batching(model: nn.Module, active: Active) -> Callable[[], None]:
    """Let the managers that a model makes carry masks.

    Returns:
        A function that undoes it, also for the managers made since.
    """
    make = model.init_continuous_batching
    batchings: weakref.WeakSet[Batching] = weakref.WeakSet()

    @functools.wraps(make)
    def init(generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
        config.allow_block_sharing = config.use_cuda_graph = False
        manager = make(generation_config, config, *args, **kwargs)
        if "_cu_fast" not in vars(manager):  # a persistent manager has it already
            manager._cu_fast = Batching(active, manager)
            batchings.add(manager._cu_fast)
        return manager

    generate_batch = model.generate_batch

    @functools.wraps(generate_batch)
    def generate(inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        check_entries(active.now(), len(inputs))  # transformers would only log the error, and return nothing
        return generate_batch(inputs, *args, **kwargs)

    undos = [
        replace_attribute(model, "init_continuous_batching", init),
        replace_attribute(model, "generate_batch", generate),
    ]

    def undo() -> None:
        for each in undos:
            each()
        for batching in list(batchings):
            batching.undo()

    return undo


def check_entries(held: Request | None, requests: int) -> None:
    """Checks what holds where requests are added to a manager.

    Args:
        held: the request that holds; None = nothing is deleted.
        requests: how many are added.

    Raises:
        ValueError: ``unlearn`` was given another number of entries.
        RuntimeError: its gates are judged as a sequence goes on, which a packed batch cannot do.
    """
    if held is not None and held.gated:
        raise RuntimeError(
            "gated=True cannot be used with continuous batching; judge the prompts before, with cu_fast.topics_of, and "
            "give unlearn() what it returns"
        )
    if held is not None and held.of == "sequence" and len(held.rows) != requests:
        raise ValueError(
            f"{requests} requests were given, and unlearn() {len(held.rows)} entries; give an entry for each request"
        )


class Batching:
    """The requests of one manager, and what each deletes.

    Its methods replace those of the manager with the same names, and call the manager's own.

    Attributes:
        requests: the manager's name for a request -> what it deletes; None = it was added when there were no masks.
        queued: names of the requests that the manager has taken; its next round finds them.
        entries: numbers of the entries of ``unlearn`` that the next requests of add_requests belong to.
        manager_s: the manager's own methods by name.
    """

    def __init__(self, active: Active, manager: Any) -> None:
        if missing := [name for name in (*REPLACED, *READ) if not hasattr(manager, name)]:
            raise RuntimeError(
                f"transformers {transformers.__version__} batches in a way that cu_fast does not know (its managers have "
                f"no {missing[0]}); use generate() inside attachment.unlearn()"
            )
        self.active, self.manager = active, manager
        self.requests: dict[str, Request | None] = {}
        self.queued: set[str] = set()
        self.entries: ContextVar[Iterator[int] | None] = ContextVar("cu_fast.entries", default=None)
        self.manager_s: dict[str, Callable] = {name: getattr(manager, name) for name in REPLACED}
        self.undos = [replace_attribute(manager, name, getattr(self, name.lstrip("_"))) for name in REPLACED]

    def undo(self) -> None:
        """Give the manager its own methods back."""
        for undo in self.undos:
            undo()
        del self.manager._cu_fast

    def add_request(self, input_ids: list[int], request_id: str | None = None, *args: Any, **kwargs: Any) -> str | None:
        """Keep what holds here for the request. Raises ValueError where its name is another open request's."""
        if request_id is None:
            with self.manager._request_lock:
                request_id = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is that of a request that has not ended; give another")
        held, entries = self.active.now(), self.entries.get()
        if entries is None:
            check_entries(held, 1)
        if held is not None:
            held = self.active.share(held, 0 if entries is None else next(entries))
        self.requests[request_id] = held  # before the manager's thread can see the request
        added = None
        try:
            added = self.manager_s["add_request"](input_ids, request_id, *args, **kwargs)
        finally:
            if added is None:
                self._end(request_id)
            else:
                self.queued.add(request_id)
        return added

    def add_requests(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        """Keep for each request its entry of what holds here, or the one that is for all.

        Raises:
            ValueError: another number of entries than of requests.
            RuntimeError: the manager shares prefixes, which changes the order of requests.
        """
        held = self.active.now()
        if held is None or held.of == "all":
            return self.manager_s["add_requests"](inputs, *args, **kwargs)
        check_entries(held, len(inputs))
        if self.manager._use_prefix_sharing:
            raise RuntimeError("the manager shares prefixes, and so adds requests in another order than they are given")
        token = self.entries.set(iter(range(len(inputs))))
        try:
            return self.manager_s["add_requests"](inputs, *args, **kwargs)
        finally:
            self.entries.reset(token)

    def warmup(self) -> None:
        """The manager's own, with nothing deleted."""
        with self.active.under(None):  # the tokens are made up, and no result is kept
            self.manager_s["warmup"]()

    # -- in the manager's thread ------------------------------------------------------------------------------

    def generation_step(self) -> None:
        """The manager's own, with the rows of the packed batch's tokens."""
        batch = self.manager.batch_processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous batching keeps two batches, in turns
            batch = batch.io_pairs[batch.current_pair].host_io
        parts = [(self._of(one.state.request_id), one.query_length) for one in batch.requests_in_batch]
        with self.active.packed(parts, batch.num_q_tokens):
            self.manager_s["_generation_step"]()

    def generation_loop_body(self, *args: Any, **kwargs: Any) -> bool:
        """The manager's own round; then the requests that the manager no longer has are ended."""
        queued = set(self.queued)
        goes_on = self.manager_s["_generation_loop_body"](*args, **kwargs)
        scheduler = self.manager.batch_processor.scheduler
        there = {_parent(name) for name in (*scheduler.active_requests, *scheduler.waiting_requests)}
        for name in queued - there:
            self._end(name)
        return goes_on

    def run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        """The manager's own; then all requests are ended."""
        try:
            self.manager_s["_run_generation_loop"](*args, **kwargs)
        finally:
            for name in list(self.requests):
                self._end(name)

    def _of(self, name: str) -> Request | None:
        if _parent(name) not in self.requests:
            raise RuntimeError(f"request {name!r} did not come through add_request, and what it deletes is not known")
        return self.requests[_parent(name)] or self.active.now()

    def _end(self, name: str) -> None:
        self.queued.discard(name)
        request = self.requests.pop(name, None)
        if request is not None:
            self.active.close(request)


def _parent(name: str) -> str:
    """The name under which a request was added: each of its sequences has a name made of it."""
    return name.split("__child#")[0]
