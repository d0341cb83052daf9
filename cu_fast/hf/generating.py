"""What ``attach`` puts around ``generate``. Part of ``cu_fast.hf.attachment``."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cu_fast.hf.active import Active
from cu_fast.hf.sites import SEQUENCES, argument_names, replace_attribute
from cu_fast.hf.states import caches_of, check_encoded, check_order, check_towers


def wrap_generate(model: nn.Module, active: Active) -> Callable[[], None]:
    """Let ``model.generate`` check its batch and its states, and announce each step.

    Returns:
        A function that undoes it.
    """
    undo = contextlib.ExitStack()
    generate, prepare = model.generate, getattr(model, "prepare_inputs_for_generation", None)
    names = argument_names(generate)

    if prepare is not None:

        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            active.step()
            return prepare(*args, **kwargs)

        undo.callback(replace_attribute(model, "prepare_inputs_for_generation", prepared))

    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args)), **kwargs}
        with _ended_streamer(given.get("streamer")), _same_depth(model):
            request = active.now()
            batch = _batch(model, given)
            if request is not None and request.of == "sequence" and batch != len(request.rows):
                raise ValueError(
                    f"generate() was given {batch} sequences, and unlearn() {len(request.rows)} entries; "
                    f"give an entry for each sequence"
                )
            if request is not None and request.gated and _drafts(model, given):
                raise ValueError(
                    "gated=True cannot be used with assisted decoding: gates would count drafts that are taken back; generate "
                    "without them, or judge the prompts before, with cu_fast.topics_of, and give unlearn() what it returns"
                )
            for cache in itertools.chain.from_iterable(map(caches_of, given.values())):
                check_order(cache)
            if given.get("encoder_outputs") is not None and any(layer.in_encoder for layer in active.layers):
                check_encoded(active, given["encoder_outputs"])
            if any(not (layer.in_encoder or layer.in_decoder) for layer in active.layers):
                check_towers(active, given)
            with active.generating(_expansion(model, given)):
                return generate(*args, **kwargs)

    undo.callback(replace_attribute(model, "generate", wrapper))
    return undo.close


@contextlib.contextmanager
def _ended_streamer(streamer: Any) -> Iterator[None]:
    """End the streamer after an error: its reader, in another thread, would wait for ever for more tokens.

    A reader of transformers' iterators gets the error. It would take an end without one for the end of an answer.
    """
    try:
        yield
    except BaseException as error:
        if streamer is not None:
            with contextlib.suppress(Exception):
                _tell(streamer, error)
            with contextlib.suppress(Exception):
                streamer.end()
        raise


class _Failed:
    """In a streamer's queue: the reader compares what it takes out with the signal of the end."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(f"the answer ended with an error: {self.error}") from self.error

    __hash__ = None


def _tell(streamer: Any, error: BaseException) -> None:
    queue = getattr(streamer, "text_queue", None)
    if queue is not None and (loop := getattr(streamer, "loop", None)) is not None:
        loop.call_soon_threadsafe(queue.put_nowait, _Failed(error))
    elif queue is not None:
        queue.put(_Failed(error))


@contextlib.contextmanager
def _same_depth(model: nn.Module) -> Iterator[None]:
    """Put the config's depth back after an error: transformers' early exit lowers it for a while, without a finally."""
    configs = [module.config for module in (model, getattr(model, "base_model", model)) if hasattr(module, "config")]
    depths = [getattr(config, "num_hidden_layers", None) for config in configs]
    try:
        yield
    except BaseException:
        for config, depth in zip(configs, depths):
            if depth is not None:
                config.num_hidden_layers = depth
        raise


def _batch(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many sequences ``generate`` was given."""
    for name in ("inputs", model.main_input_name, *SEQUENCES):
        if isinstance(given.get(name), Tensor):
            return given[name].shape[0]
    return 1 if given.get("encoder_outputs") is None else given["encoder_outputs"][0].shape[0]


def _expansion(model: nn.Module, given: Mapping[str, Any]) -> int:
    """How many rows of the batch ``generate`` makes of one sequence: the larger of beams and return sequences."""
    return max(_option(model, given, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _drafts(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether ``generate`` computes tokens that it may take back."""
    names = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
    return any(_option(model, given, name) for name in names)


def _option(model: nn.Module, given: Mapping[str, Any], name: str) -> Any:
    return given.get(name) or getattr(given.get("generation_config") or model.generation_config, name, None)
