"""How strong a deletion may be: a rule for ``find_mask(choose=...)`` that a user can state, "at most 1 % loss"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from cu_fast.evaluate import score_answers
from cu_fast.masks import Mask


def within_loss(
    attachment,
    tokenizer,
    rows: Sequence[Mapping[str, str]],
    max_loss: float = 0.01,
    figure: Literal["probability", "kept_share"] = "probability",
) -> Callable[[Sequence[Mask]], int]:
    """The strongest deletion under which answers that should stay lose at most a share of what they were.

    Args:
        attachment, tokenizer: the model's.
        rows: questions and answers without the topic, as in training; not those that the control was counted from, where
            there are others. A hundred measure a loss of 1 % to about half its size.
        max_loss: the share of the figure, its mean over the rows, that may go: 0.01 = 1 %.
        figure: of ``AnswerScores``. "probability" falls about as TOFU's model utility does; "kept_share", what greedy
            generation gets right before its first mistake, falls several times as fast.

    Returns:
        A function for ``find_mask``, best with ``grow="enrichment"``: of masks that grow, the index of the strongest
        within the loss. It takes the loss to grow with the mask and looks for the bound by halves: one pass over the
        rows for the model as it is, and about log2 of the number of masks more.

    Raises:
        ValueError, from the function too: max_loss out of range, or even the weakest mask costs more.
    """
    if not 0 <= max_loss < 1:
        raise ValueError(f"max_loss is {max_loss}; it should be a share, at least 0 and below 1")
    if figure not in ("probability", "kept_share"):
        raise ValueError(f"figure is {figure!r}; it should be 'probability' or 'kept_share'")

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
