"""The block in which topics are deleted, ``with attachment.unlearn(...):``. Part of ``cu_fast.hf.attachment``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cu_fast.hf.active import Active
from cu_fast.hf.request import Request
from cu_fast.hf.topics import Entry

if TYPE_CHECKING:
    from cu_fast.hf.attachment import Attachment


class Unlearning:
    """A block in which topics are deleted; made by ``Attachment.unlearn``, which says what it raises."""

    _request: Request | None = None

    def __init__(
        self,
        attachment: Attachment,
        active: Active,
        topics: Entry | list[Entry],
        gated: bool,
        check_model: Callable[[], None],
    ) -> None:
        self._attachment, self._active, self._check_model = attachment, active, check_model
        self._topics, self._gated = topics, gated

    def __enter__(self) -> Attachment:
        if self._request is not None:
            raise RuntimeError("this unlearn context was entered before; call attachment.unlearn() again")
        active = self._active
        self._request = request = active.open(self._topics, self._gated)
        if request.deletes:
            try:
                self._check_model()
            except RuntimeError:
                active.close(request)
                raise
        request.outer = active.request.get()
        active.request.set(request)
        return self._attachment

    def __exit__(self, kind: Any, *error: Any) -> None:
        if not self._close() and kind is None:
            raise RuntimeError(
                "this unlearn context was left where another one holds: contexts of one thread were entered and left in "
                "turns (by generators, say), or this one in another thread or task than it was entered in. What ran in "
                "between may have run under the other's masks"
            )

    def __del__(self) -> None:
        # The block was never left: an interrupt came before __exit__, or only __enter__ was called. Forwards that still
        # find the request closed raise.
        if self._request is not None:
            self._active.close(self._request)

    def _close(self) -> bool:
        """Let the outer request hold again. Returns whether this one held here."""
        active, request = self._active, self._request
        active.close(request)
        if active.request.get() is not request:
            return False
        outer = request.outer
        while outer is not None and outer.closed:
            outer = outer.outer
        active.request.set(outer)
        return True
