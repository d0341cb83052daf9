"""Which codes belong to a topic (count, rank, find), how strong a deletion may be (strength), for which prompts it holds
(gate, learn)."""

from cu_fast.unlearn.controls import random_mask, replace_words
from cu_fast.unlearn.count import CodeCounts, count_codes
from cu_fast.unlearn.find import CodeEvidence, Finding, find_mask
from cu_fast.unlearn.gate import fired, gate_values, level_for, topics_of
from cu_fast.unlearn.learn import TextCounts, count_texts, fit_gate
from cu_fast.unlearn.statistics import enrichment, p_values
from cu_fast.unlearn.strength import within_loss

__all__ = [
    "CodeCounts",
    "CodeEvidence",
    "Finding",
    "TextCounts",
    "count_codes",
    "count_texts",
    "enrichment",
    "find_mask",
    "fired",
    "fit_gate",
    "gate_values",
    "level_for",
    "p_values",
    "random_mask",
    "replace_words",
    "topics_of",
    "within_loss",
]
