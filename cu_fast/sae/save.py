"""Writes an autoencoder: SAELens' own format, fp32, which is the one that this package writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch

from cu_fast.files import write_directory
from cu_fast.sae import sae_lens
from cu_fast.sae.form import SAE


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write an autoencoder, so that ``load_sae(folder).sha256()`` is its own; the folder is written whole or not at all.

    Kept are site, site_out, model, l0 and b_dec. SAELens reads the folder as well, but for a topk that writes to another
    place than it reads, an architecture that it does not have.

    Args:
        sae: on any device.
        folder: a new one, or one that holds such an autoencoder, which is replaced. Only its owner can read it.

    Raises:
        FileExistsError: the folder holds other files, or is a file.
        ValueError: SAELens' format has no word for its scale: a norm other than sqrt(Din), or a scale other than "none" where
            it writes to another place than it reads.
    """
    config, tensors = sae_lens.written(sae)
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    files = {sae_lens.CONFIG: text.encode(), sae_lens.FILE: safetensors.torch.save(tensors)}
    write_directory(folder, files, owned="|".join(map(re.escape, files)))
