"""Masks: what is deleted, their files, and their tables on a device."""

from cu_fast.masks.mask import FILES, LatentRows, Mask, load_masks
from cu_fast.masks.tables import ChangeTable, MaskTable, stream_of

__all__ = ["FILES", "ChangeTable", "LatentRows", "Mask", "MaskTable", "load_masks", "stream_of"]
