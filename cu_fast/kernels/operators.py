"""One declaration per operator: the reference's signature, a fake, and the arguments that are written to.

    schema    made of the signature; Triton's operators are defined by it, and a test compares csrc/ops.cpp with it
    fake      gives the results without data, for torch.compile and meta tensors, of the native library, of Triton and of
              the reference
    writes    the arguments that the operator adds to in place

The reference is registered here, as ``torch.ops.cu_fast_reference.*``, for what torch.compile traces: what Inductor would
make of its functions fuses products with sums on a GPU, and divides less exactly, which would change results.

Fakes and Triton's functions take one argument, ``a``, which has the operator's arguments by name: ``a.z``, ``a.k``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cu_fast.kernels import reference


class Operator(NamedTuple):
    """A declaration.

    Attributes:
        name: of the operator, and of its function in ``reference``.
        fake: the results without data, of ``a``.
        writes: names of the arguments that are added to in place.
    """

    name: str
    fake: Callable[[Any], Tensor | tuple[Tensor, ...]]
    writes: tuple[str, ...] = ()

    @property
    def schema(self) -> str:
        """As torch.library takes it: "masked_decode(Tensor ids, ...) -> Tensor"."""
        return self.name + torch.library.infer_schema(getattr(reference, self.name), mutates_args=self.writes)

    def takes_named(self, function: Callable[[Any], Any]) -> Callable[..., Any]:
        """A function that takes the operator's arguments, and calls one that takes them by name as ``a``."""
        names = tuple(inspect.signature(getattr(reference, self.name)).parameters)

        def called(*arguments: Any, **others: Any) -> Any:
            return function(SimpleNamespace(**dict(zip(names, arguments)), **others))

        return called

    def register_fake(self, library: str, lib: torch.library.Library | None = None) -> None:
        """Register the fake for ``torch.ops.<library>.<name>``.

        Args:
            library: its namespace.
            lib: the registration's lifetime is this object's; None = the process's.
        """
        torch.library.register_fake(f"{library}::{self.name}", self.takes_named(self.fake), lib=lib)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _int32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _selection(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    T = a.z.shape[0]
    return _fp32(a.z, T, a.k), _int32(a.z, T, a.k), _int32(a.z, T if a.return_hits else 0)


def _scan_plane(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups = (a.digits.shape[0] + 63) // 64
    plane = a.digits.new_empty((groups, (a.E + 3) // 4, 64, 4), dtype=torch.uint8)
    return plane, _fp32(a.digits, groups, 196), _fp32(a.digits, a.E)


def _digits(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    C, E = a.codes.shape
    return a.codes.new_empty((C, 3, (E + 63) // 64 * 64), dtype=torch.int8), _fp32(a.codes, C), _fp32(a.codes, C)


def _deletion(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, kept = a.x.shape[0], a.x if a.residual is None else a.residual
    return kept.new_empty(kept.shape), _int32(a.x, T), _fp32(a.x, T)


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("sae_encode", lambda a: _fp32(a.x, a.x.shape[0], a.W_digits.shape[0])),
        Operator("sae_encode_topk", lambda a: (_fp32(a.x, a.x.shape[0], a.k), _int32(a.x, a.x.shape[0], a.k))),
        Operator("codebook_quantize", _selection),
        Operator("masked_decode", lambda a: a.table.new_empty((a.ids.shape[0], a.table.shape[1]))),
        Operator(
            "codebook_bottleneck",
            lambda a: a.table.new_empty((a.x.shape[0], a.table.shape[1])),
            writes=("receipt",),
        ),
        Operator("delete_latents", _deletion),
        Operator("pack_digits", _digits),
        Operator("pack_scan", _scan_plane),
    )
}

# What the reference alone has as operators: steps between two of the others.
STEPS = {
    operator.name: operator
    for operator in (
        Operator("cosine_factor", lambda a: _fp32(a.step, len(a.step))),
        Operator("l2_bias", lambda a: _fp32(a.step, len(a.step))),
        Operator(
            "code_changes", lambda a: (_fp32(a.scores, *a.ids.shape), a.ids.new_empty(a.ids.shape, dtype=torch.bool))
        ),
        Operator("token_scales", lambda a: (_fp32(a.x, len(a.x)), _fp32(a.x, len(a.x)))),
    )
}


def _register_reference() -> torch.library.Library:
    library = torch.library.Library("cu_fast_reference", "DEF")
    for operator in (*OPERATORS.values(), *STEPS.values()):
        library.define(operator.schema)
        library.impl(operator.name, getattr(reference, operator.name), "CompositeExplicitAutograd")
        operator.register_fake("cu_fast_reference", library)
    return library


_library = _register_reference()  # torch removes the operators when this object is freed
