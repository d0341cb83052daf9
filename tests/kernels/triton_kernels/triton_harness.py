"""What the cases of the Triton kernels share: under Triton's interpreter, or without TRITON_INTERPRET on a GPU.

A file of cases is a script that prints a line of JSON for each, or for those that it is given by name; under the
interpreter also a last one, with the statements of the kernels that it ran. In a process of its own: the interpreter cannot be
left again, nor what a kernel did to a GPU's context.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator

import gpu_examples
import hurtful
import torch
from calls import call
from tiers import TEST_ALL

from cu_fast.kernels import reference

on = functools.partial(gpu_examples.on, device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def by_triton(name: str, **given):
    """The Triton kernels of an operator, on the device that the cases are for."""
    return call(name, on=torch.ops.cu_fast_triton, **on(given))


def by_reference(name: str, **given):
    return call(name, on=reference, **given)


class Watch:
    """Starts kernels, and looks at what they leave. all_pass: every code is a candidate of the scan."""

    def __init__(self, module, all_pass: bool = False):
        self.module, self.all_pass, self.left, self.kernels = module, all_pass, [], []
        self.start, module.start = module.start, self

    def __call__(self, kernel, programs, config, **arguments):
        self.start(kernel, programs, config, **arguments)
        name = kernel.__name__
        self.kernels.append(name)
        if name == "scan_threshold" and self.all_pass:
            arguments["tau"].fill_(-torch.inf)
        if name == "narrow":
            self.narrowed = arguments
        if name == "prove":
            self.left += arguments["exact"][:programs].tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.module.start = self.start


def same(got, want) -> None:
    for name, a, b in zip(("first", "second", "third"), got, want):
        a, b = a.cpu(), b.cpu()
        if not hurtful.equal(a, b):
            raise AssertionError(f"the {name} result differs: {a.flatten()[:6]} is not {b.flatten()[:6]}")


@contextlib.contextmanager
def statements_that_run() -> Iterator[set[str]]:
    """FILE:LINE of each statement of the kernels that the interpreter runs within the block.

    The interpreter compiles a kernel from its syntax tree; here each statement of that tree is preceded by a note of it.
    """
    from triton.runtime.interpreter import FunctionRewriter

    seen, compiled = set(), FunctionRewriter._compile_and_exec

    def noted(rewriter: FunctionRewriter, tree: ast.Module) -> Callable:
        file = os.path.basename(rewriter.filename)
        for node in list(ast.walk(tree.body[0])):
            for field in ("body", "orelse"):
                block = getattr(node, field, ())
                if isinstance(block, list):
                    notes = [ast.parse(f"_seen({f'{file}:{each.lineno}'!r})").body[0] for each in block]
                    setattr(node, field, [each for pair in zip(notes, block) for each in pair])
        rewriter.fn.__globals__["_seen"] = seen.add
        return compiled(rewriter, tree)

    FunctionRewriter._compile_and_exec = noted
    yield seen
    FunctionRewriter._compile_and_exec = compiled


def report(cases: dict[str, tuple], heavy: Collection[str] = ()) -> None:
    """Runs the cases that the command line names, or all; without CU_FAST_TEST_ALL=1, all but the heavy ones."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of the NaN and Inf that are meant
    torch.set_num_threads(1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert set(heavy) <= set(cases), set(heavy) - set(cases)
    with statements_that_run() if interpreted else contextlib.nullcontext() as seen:
        for name in sys.argv[1:] or [name for name in cases if TEST_ALL or name not in heavy]:
            run, *arguments = cases[name]
            begin = time.process_time()
            try:
                run(*arguments)
                failure = None
            except Exception:
                failure = traceback.format_exc()
            seconds = round(time.process_time() - begin, 2)
            print(json.dumps({"case": name, "failure": failure, "seconds": seconds}), flush=True)
    if interpreted:
        print(json.dumps({"statements": sorted(seen)}))
