"""A model folder: a transformers model and its tokenizer, with the bottlenecks and masks under ``codebook``.

    config.json, model.safetensors, tokenizer.json, ...   as transformers writes them, without the bottlenecks
    codebook/config.json, codebook/bottleneck.safetensors, codebook/masks/<name>/   as ``attachment.save`` does

transformers loads the folder as the plain model, without masks: serve it through :func:`load_model`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from cu_fast.files import read_json, refuse_others, replacing, target_of
from cu_fast.hf.active import Silent
from cu_fast.hf.attach import attach
from cu_fast.hf.attachment import Attachment
from cu_fast.hf.files import OWN_FILES
from cu_fast.hf.hooks import CHILD
from cu_fast.nn import CodebookBottleneck

CODEBOOK = "codebook"
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


def save_model(attachment: Attachment, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a model folder, whole or not at all, in place of one that is there.

    Other files of the folder, a trainer's checkpoints say, stay in it. It is readable by its owner alone. For a moment
    the disk holds both folders.

    Args:
        attachment: of the model.
        tokenizer: the model's.
        path: the folder.

    Raises:
        FileExistsError: ``path`` is a file, or its ``codebook`` holds anything but an attachment.
        ValueError: a name that no folder or file can have.
    """
    path = target_of(path)
    refuse_others(path / CODEBOOK, OWN_FILES)
    state = {name: value for name, value in attachment.model.state_dict().items() if CHILD not in name.split(".")}
    with replacing(path) as new:
        attachment.model.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        attachment.save(new / CODEBOOK)
        refuse_others(path / CODEBOOK, OWN_FILES)
        _keep_others(path, new)


def read_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tokenizer]:
    """A plain transformers model, of the class that its config names, and its tokenizer.

    Nothing is downloaded, nothing is unpickled, no code of the folder runs, and no file stays mapped.

    Args:
        path: the folder.
        dtype: of the model.

    Returns:
        (the model, on the CPU in evaluation mode; the tokenizer, which pads).

    Raises:
        FileNotFoundError: no model is there.
        ValueError: transformers cannot read the model, or weights are missing.
    """
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json")
    names = read_json(file).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{file} names the architectures {names!r}; the first should be a model of transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model, found = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a damaged file makes transformers raise errors of any kind
        raise ValueError(f"{path} is no model that transformers can read: {type(error).__name__}: {error}") from error
    if missing := sorted({*found["missing_keys"], *map(str, found["mismatched_keys"])}):
        raise ValueError(
            f"{path} lacks weights of its {name}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; they "
            f"would be random. Save the model again"
        )
    for tensor in (*model.parameters(), *model.buffers()):  # out of the mapped file
        tensor.data = tensor.data.clone()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # generation continues at the right end
    return model.eval(), tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, *, silent: Silent = "refuse"
) -> tuple[nn.Module, Tokenizer, Attachment]:
    """Model, tokenizer and attachment from a model folder, its masks included.

    Args:
        path: the folder.
        dtype: of the model, and of bottlenecks stored in a narrower one: widening rounds nothing. Bottlenecks stored in
            a wider dtype keep it, since rounding their codes would make another codebook of them.
        silent: what happens in a forward outside every ``unlearn``: "refuse" or "plain"; see :func:`cu_fast.attach`.

    Returns:
        (model, tokenizer, attachment). The model is never returned without its bottlenecks.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, made for another model, or was replaced while it was read.
    """
    path = Path(path)
    before = _state_of(path)
    model, tokenizer = read_model(path, dtype)
    if not (path / CODEBOOK).is_dir():
        raise FileNotFoundError(f"{path} holds no {CODEBOOK!r} folder: it is a model without bottlenecks")
    attachment = attach(model, path / CODEBOOK, silent=silent)
    if _state_of(path) != before:
        raise ValueError(f"{path} was saved anew while it was loaded; load it again")
    for bottleneck in attachment.bottlenecks.values():
        if isinstance(bottleneck, CodebookBottleneck) and (
            torch.promote_types(bottleneck.codebook.codes.dtype, dtype) == dtype
        ):
            bottleneck.to(dtype)
    return model, tokenizer, attachment


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Device, inode and time of a folder: they change where it, or an entry of it, is replaced. None = no folder."""
    if not path.is_dir():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _keep_others(path: Path, new: Path) -> None:
    """Link the entries of the old folder that are no part of a model into the new one, so that no file is lost."""
    for entry in path.iterdir() if path.is_dir() else ():
        beside = new / entry.name
        if beside.exists() or re.fullmatch(WEIGHTS, entry.name):  # old weights might be loaded with the new model's
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, beside, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, beside, follow_symlinks=False)
