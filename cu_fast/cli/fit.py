"""``cu-fast train --splice delta``: codes fitted to a model that stays as it is. Part of ``cu_fast.cli.models``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TEXTS = (
    'texts: a text file, read as one running text; a .jsonl file whose lines are strings or objects with "text"; a '
    ".parquet file, or a folder of the datasets library, with the column text"
)


def refuse(splice: str, **options: Any) -> None:
    """Raises ValueError for an option that was given and means nothing here."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, and has no meaning with --splice {splice}; leave it out"
            )


def run(model: str, data: Path, output: Path, dtype: str | None, **settings: Any) -> dict[str, float]:
    """Fit codes with the settings that were given, those that are None at their defaults; returns the figures."""
    import torch

    from cu_fast.hf.checkpoint import read_model
    from cu_fast.train.fit import fit_codes

    network, tokenizer = read_model(model, torch.float32 if dtype == "fp32" else torch.bfloat16)
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        network.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))))
    given = {name: value for name, value in settings.items() if value is not None}
    return fit_codes(network, tokenizer, data, output, bf16=dtype != "fp32", **given)
