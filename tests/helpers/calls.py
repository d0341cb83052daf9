"""Raw operators, called by the names of their arguments. What is not given is None, or False.

    call("codebook_quantize", z=z, codes=codes, k=8, mask=masks, scan=plane)     the native library
    call("codebook_quantize", on=reference, z=z, codes=codes, k=8)               the reference
    call("masked_decode", on=torch.ops.cu_fast_triton, ids=ids, table=table)     any other that has the operators

mask is (mask_table, mask_row) or None, scan (scan_plane, scan_terms, scan_mean) or None.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from cu_fast.kernels import native, reference

assert native.LIBRARY  # importing it registers torch.ops.cu_fast
GROUPS = {"mask": ("mask_table", "mask_row"), "scan": ("scan_plane", "scan_terms", "scan_mean")}


def arguments(name: str, **given: Any) -> dict[str, Any]:
    """All arguments of an operator, in the order of its schema."""
    for group, members in GROUPS.items():
        if (values := given.pop(group, None)) is not None:
            given.update(zip(members, values, strict=True))
    parameters = inspect.signature(getattr(reference, name)).parameters
    absent = {"bool": False, "Tensor | None": None}
    made = {key: given.pop(key, absent.get(p.annotation, inspect.Parameter.empty)) for key, p in parameters.items()}
    assert not given, f"{name} has no {', '.join(given)}"
    needed = [key for key, value in made.items() if value is inspect.Parameter.empty]
    assert not needed, f"{name} needs {', '.join(needed)}"
    return made


def call(name: str, on: Any = torch.ops.cu_fast, **given: Any) -> Any:
    return getattr(on, name)(**arguments(name, **given))
