"""Masks: what is deleted, for which prompts, their files, and their tables on a device."""

from cu_fast.masks.gate import Gate
from cu_fast.masks.mask import FILES, Mask, load_masks
from cu_fast.masks.rows import LatentRows
from cu_fast.masks.tables import ChangeTable, MaskTable, stream_of

__all__ = ["FILES", "ChangeTable", "Gate", "LatentRows", "Mask", "MaskTable", "load_masks", "stream_of"]
