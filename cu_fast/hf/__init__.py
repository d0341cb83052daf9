"""The swap in a Hugging Face model: attach and detach, which masks hold, model folders."""

from cu_fast.hf.attachment import Attachment, StaleCacheError, attach
from cu_fast.hf.checkpoint import Tokenizer, load_model, save_model

__all__ = ["Attachment", "StaleCacheError", "Tokenizer", "attach", "load_model", "save_model"]
