"""The settings that a checkpoint was trained with, and whether a run may go on from it. Part of ``cu_fast.train``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from cu_fast.nn import BottleneckConfig

# What a checkpoint holds beside transformers' own files.
SETTINGS = "cu_fast.json"  # the settings that it was trained with
USAGE = "cu_fast.safetensors"  # layer -> int64 [C], how often each code was kept since codes were last moved

# The TrainingArguments that a step depends on. A run's length, and what it logs and saves, may change when it resumes.
STEP_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "seed", "data_seed", "bf16", "fp16",
)  # fmt: skip


def settings_of(
    model: nn.Module,
    rows: Sequence[Mapping[str, list]],
    bottlenecks: Mapping[str, BottleneckConfig],
    arguments: TrainingArguments,
    **given: Any,
) -> dict[str, Any]:
    """All that a checkpoint's weights and optimizer depend on.

    Args:
        model: before training.
        rows: encoded, as :func:`cu_fast.rows.encode_row` gives them.
        bottlenecks: layer name -> config.
        arguments: transformers' own.
        given: further settings, JSON values.

    Returns:
        Name -> JSON value.
    """
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    chosen = {name: getattr(arguments, name) for name in STEP_ARGUMENTS}
    return {
        "model": f"{type(model).__name__}, {len(parameters)} parameters {_sha256(parameters)}",
        "dataset": f"{len(rows)} rows {_sha256(rows)}",
        **{f"layer {name}": dataclasses.asdict(config) for name, config in bottlenecks.items()},
        **given,
        **{name: getattr(value, "value", value) for name, value in chosen.items()},  # enums as their values
    }


def _sha256(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:12]


def no_checkpoint(arguments: TrainingArguments) -> None:
    """For a fresh run: raises ValueError where its folder holds a checkpoint, which could be resumed in its place."""
    if (found := _newest_checkpoint(arguments)) is not None:
        raise ValueError(f"{found} is an earlier run's; resume that run, or give another output folder")


def checkpoint_to_resume(arguments: TrainingArguments, settings: Mapping[str, Any]) -> Path:
    """The newest checkpoint of a folder, checked but not loaded.

    Args:
        arguments: transformers' own, with the folder.
        settings: of the run that resumes, from :func:`settings_of`.

    Raises:
        ValueError: there is none, a file of it is missing or damaged, or it was made with other settings.
    """
    found = _newest_checkpoint(arguments)
    if found is None:
        raise ValueError(f"there is no checkpoint in {arguments.output_dir} to resume from; train without resume")
    rank = f"_{arguments.process_index}" if arguments.world_size > 1 else ""
    file = found / SETTINGS
    try:
        made_with = dict(json.loads(file.read_bytes()))
        file = found / "trainer_state.json"
        TrainerState.load_from_json(str(file))
        for file in (found / "optimizer.pt", found / "scheduler.pt", found / f"rng_state{rank}.pth"):
            with safe_globals():  # the numpy generator's state
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for file in (found / USAGE, *(sorted(found.glob("model*.safetensors")) or [found / "model.safetensors"])):
            with safetensors.safe_open(file, framework="pt"):
                pass
    except Exception as error:  # a damaged file makes its reader raise errors of any kind
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}), so {found} cannot be resumed from: it was not written by "
            "this training, or not to its end; delete it to go on from the checkpoint before it"
        ) from error
    if changed := list(_differences(made_with, json.loads(json.dumps(settings)))):
        raise ValueError(
            f"{found} was made with other settings: {'; '.join(changed)}. Resume with those of before, or train into "
            "another folder"
        )
    return found


def _newest_checkpoint(arguments: TrainingArguments) -> Path | None:
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output folder {folder} is a file; give the name of a folder")
    found = get_last_checkpoint(folder) if folder.exists() else None
    return None if found is None else Path(found)


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> Iterator[str]:
    for name in dict.fromkeys([*now, *was]):
        before, after = was.get(name, "absent"), now.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f" of {name}")
        elif before != after:
            before, after = ("there" if isinstance(value, dict) else value for value in (before, after))
            yield f"{name}{of} was {before} and is {after}"
