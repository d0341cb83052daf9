"""One declaration per operator: csrc/ops.cpp, the native library and Triton have the schemas of kernels/operators.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from calls import every_operator

from cu_fast.kernels import triton
from cu_fast.kernels.operators import OPERATORS

TEXT = (Path(__file__).parents[2] / "csrc/ops.cpp").read_text()
NATIVE = {schema.name: schema for schema in map(torch._C.parse_schema, re.findall(r'm\.def\("(.*)"\);', TEXT))}
# What the native library says of itself and of the machine: without a reference, and without fakes.
QUERIES = {
    "selection_plan", "cuda_selection_plan", "simd_level", "cuda_build", "cuda_driver_failure", "peak", "peak_read",
}  # fmt: skip


def parts(schema) -> tuple[list, list]:
    """Arguments: name, type, and whether it is written; types of the results. A SymInt is an int to the native library."""
    arguments = [
        (a.name, str(a.type).replace("SymInt", "int"), bool(a.alias_info and a.alias_info.is_write))
        for a in schema.arguments
    ]
    return arguments, [str(result.type) for result in schema.returns]


def test_every_native_operator_is_declared():
    assert set(NATIVE) == set(OPERATORS) | QUERIES


def test_every_operator_has_arguments_to_be_tested_with():
    assert set(every_operator(2, 20, 50, 4)) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_native_schema_is_the_declared_one(name):
    assert parts(NATIVE[name]) == parts(torch._C.parse_schema(OPERATORS[name].schema))


@pytest.mark.parametrize("name", triton.HOME)
def test_the_triton_schema_is_the_declared_one(name):
    assert parts(triton.operator(name)._schema) == parts(torch._C.parse_schema(OPERATORS[name].schema))
