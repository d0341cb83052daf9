"""A model folder: a transformers model and its tokenizer, with the bottlenecks and masks under ``codebook``.

    config.json, model.safetensors, tokenizer.json, ...   as transformers writes them, without the bottlenecks
    codebook/config.json, codebook/bottleneck.safetensors, codebook/masks/<name>/   as ``attachment.save`` does

So the folder also loads as the plain model that it holds, which knows nothing of masks: serve it through
:func:`load_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from cu_fast.hf import CHILD, Attachment, attach

CODEBOOK = "codebook"


def save_model(attachment: Attachment, tokenizer: Any, path: str | Path) -> None:
    """Write a model folder."""
    path = Path(path)
    state = {name: value for name, value in attachment.model.state_dict().items() if CHILD not in name.split(".")}
    attachment.model.save_pretrained(path, state_dict=state)
    tokenizer.save_pretrained(path)
    attachment.save(path / CODEBOOK)


def read_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    """A plain transformers model, of the class that its config names, in evaluation mode, and its tokenizer.

    Nothing is downloaded and nothing is unpickled.

    Raises:
        FileNotFoundError, ValueError: no model there, or one that transformers cannot read.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json")
    options = {"local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(path, **options)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{path / 'config.json'} names the architectures {names}; transformers should know the first")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # generation continues at the right end
    model = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    return model.eval(), tokenizer


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any, Attachment]:
    """Model, tokenizer and attachment from a model folder, its masks included.

    dtype: of the model, and of bottlenecks stored in a narrower one: widening rounds nothing. Bottlenecks stored in
        a wider dtype keep it, since rounding their codes would make another codebook of them.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or made for another model. The model is never
            returned without its bottlenecks.
    """
    path = Path(path)
    model, tokenizer = read_model(path, dtype)
    if not (path / CODEBOOK).is_dir():
        raise FileNotFoundError(f"{path} holds no {CODEBOOK!r} folder: it is a model without bottlenecks")
    attachment = attach(model, path / CODEBOOK)
    for bottleneck in attachment.bottlenecks.values():
        if torch.promote_types(bottleneck.codebook.codes.dtype, dtype) == dtype:
            bottleneck.to(dtype)
    return model, tokenizer, attachment
