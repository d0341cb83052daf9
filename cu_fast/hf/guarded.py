"""The forward of a module that has hooks of an attachment: it finds out whether they are there. Part of ``cu_fast.hf.attachment``.

A library may take every hook out of a model (pyvene does so in each of its calls), or call ``forward`` itself, which runs
none (sentence-transformers does). A model that was swapped must not answer without its masks then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cu_fast.hf.active import Active
from cu_fast.hf.sites import replace_attribute


class Guarded:
    """One module and its hooks.

    Args:
        module: that hooks are registered on, with :meth:`add`.
        name: as in ``model.named_modules()``.
        active: the attachment's run-time state.
        runner: its number in ``Layer.runner``; None = it is a layer.
    """

    def __init__(self, module: nn.Module, name: str, active: Active, runner: int | None) -> None:
        self.module, self.name, self.active, self.runner = module, name, active, runner
        self.handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> Callable[[], None]:
        """Expect a hook. Returns the function that takes it out."""
        self.handles.append(handle)
        return handle.remove

    def install(self) -> Callable[[], None]:
        """Give the module a forward that looks for the hooks first. Returns a function that undoes it.

        A runner whose ``forward`` was called in place of itself is called, so that its hooks run.
        """
        forward = self.module.forward

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self._check_hooks()
                if self.runner is not None and not self.active.inside(self.runner):
                    return self.module(*args, **kwargs)
            return forward(*args, **kwargs)

        return replace_attribute(self.module, "forward", guarded)

    def _check_hooks(self) -> None:
        after, before = self.module._forward_hooks, self.module._forward_pre_hooks
        if not all(handle.id in after or handle.id in before for handle in self.handles):
            raise RuntimeError(
                f"hooks of module {self.name!r} were taken out since attach(), and masks would not reach it; use the library "
                f"that does so on a model without an attachment, or detach() and attach() again after it"
            )
