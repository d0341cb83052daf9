"""The swap in a Hugging Face model: attach and detach, which masks hold, model folders."""

from cu_fast.hf.active import StaleCacheError
from cu_fast.hf.attach import attach, attach_masks
from cu_fast.hf.attachment import Attachment
from cu_fast.hf.checkpoint import Tokenizer, load_model, save_model

__all__ = ["Attachment", "StaleCacheError", "Tokenizer", "attach", "attach_masks", "load_model", "save_model"]
