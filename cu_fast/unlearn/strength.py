"""How strong a deletion may be: a rule for ``find_mask(choose=...)`` that a user can state, "at most 1 % loss"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from cu_fast.evaluate import score_answers
from cu_fast.masks import Mask
from cu_fast.ops.checks import check_choice

if TYPE_CHECKING:
    from cu_fast.hf import Attachment, Tokenizer

Figure = Literal["probability", "kept_share"]


def within_loss(
    attachment: Attachment,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, str]],
    max_loss: float = 0.01,
    figure: Figure = "probability",
) -> Callable[[Sequence[Mask]], int]:
    """A rule for the strongest deletion under which answers that should stay lose at most a share of their figure.

    Args:
        attachment: from ``cu_fast.attach``.
        tokenizer: the model's.
        rows: questions and answers without the topic, with the keys of training rows. Not those that the control was
            counted from, where there are others. A hundred rows measure a loss of 1 % to about half its size.
        max_loss: the share of the figure, its mean over the rows, that may be lost, at least 0 and below 1: 0.01 = 1 %.
        figure: of ``AnswerScores``. "probability" falls about as TOFU's model utility does; "kept_share", what greedy
            generation gets right before its first mistake, falls several times as fast.

    Returns:
        A function for ``find_mask(choose=...)``, best with ``grow="enrichment"``: of masks that grow, the index of the
        strongest within the loss. It assumes that the loss grows with the mask and searches by halves: one pass over
        the rows for the model without masks, and one for each of about log2(number of masks) masks.

    Raises:
        ValueError: max_loss out of range, or an unknown figure. From the function: even the weakest mask costs more, or
            the model does not know the answers.
    """
    if not 0 <= max_loss < 1:
        raise ValueError(f"max_loss is {max_loss}; it should be a share, at least 0 and below 1")
    check_choice("figure", figure, get_args(Figure))

    def kept(topics: str | None) -> float:
        with attachment.unlearn(topics):
            return float(getattr(score_answers(attachment.model, tokenizer, rows), figure).mean())

    def loss(mask: Mask, whole: float) -> float:
        attachment.add_mask(mask, name=(name := f"{mask.topic}, on trial"))
        try:
            return 1 - kept(name) / whole
        finally:
            attachment.remove_mask(name)

    def choose(masks: Sequence[Mask]) -> int:
        whole = kept(None)
        if whole == 0:
            raise ValueError("rows are answers that the model does not know; give some that it does")
        good, bad = -1, len(masks)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if loss(masks[middle], whole) <= max_loss else (good, middle)
        if good < 0:
            raise ValueError(
                f"max_loss is {max_loss}; the weakest mask of {masks[0].topic!r} ({masks[0].num_deleted} codes) costs "
                f"{loss(masks[0], whole):.3g}; allow more, or give find_mask grow='enrichment'"
            )
        return good

    return choose
