"""Which codes belong to a topic (count, find), how strong a deletion may be (strength), for which prompts it holds (gate)."""

from cu_fast.unlearn.count import CodeCounts, count_codes
from cu_fast.unlearn.find import (
    CodeEvidence,
    Finding,
    enrichment,
    find_mask,
    p_values,
    random_mask,
    replace_words,
)
from cu_fast.unlearn.gate import fired, level_for, topics_of
from cu_fast.unlearn.strength import within_loss

__all__ = [
    "CodeCounts",
    "CodeEvidence",
    "Finding",
    "count_codes",
    "enrichment",
    "find_mask",
    "fired",
    "level_for",
    "p_values",
    "random_mask",
    "replace_words",
    "topics_of",
    "within_loss",
]
