"""An attachment on disk: ``config.json``, ``bottleneck.safetensors``, ``masks/<name>/<number>/``. Knows no models."""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from cu_fast._checks import FLOATS
from cu_fast.config import BottleneckConfig
from cu_fast.masks import Mask, read_json, read_safetensors, write_directory
from cu_fast.nn import CodebookBottleneck

FORMAT = "cu_fast.attachment"
FORMAT_VERSION = 1


class Record(NamedTuple):
    """``config.json``: the model it was made for, and for each layer its config and its codebook's sha256."""

    model_class: str
    model_type: str | None
    configs: dict[str, BottleneckConfig]
    hashes: dict[str, str]


def write(
    path: Path,
    bottlenecks: Mapping[str, CodebookBottleneck],
    masks: Mapping[str, tuple[Mask, ...]],
    model_class: str,
    model_type: str | None,
) -> None:
    """Write the folder, whole or not at all. Raises FileExistsError where anything but an attachment is there."""
    if path.exists() and not (path.is_dir() and _is_replaceable(path)):
        raise FileExistsError(f"{path} exists and is no attachment; give the name of a new folder")
    layers, tensors = {}, {}
    for name, bottleneck in bottlenecks.items():
        config = dataclasses.replace(bottleneck.config, mask_mode=bottleneck.mask_mode)
        layers[name] = {"codebook_sha256": bottleneck.codebook_sha256(), "config": config.to_dict()}
        for key, value in bottleneck.state_dict().items():
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_class": model_class,
        "model_type": model_type,
        "layers": layers,
    }
    files = {"config.json": json.dumps(record, indent=2).encode()}
    files["bottleneck.safetensors"] = safetensors.torch.save(tensors)
    for name, parts in masks.items():
        folder = urllib.parse.quote(name, safe=" ").replace(".", "%2E")  # a file name whatever the name, never ".."
        for number, mask in enumerate(parts):
            files |= {f"masks/{folder}/{number}/{file}": content for file, content in mask.to_files().items()}
    write_directory(path, files)


def read_record(path: Path) -> Record:
    """Raises FileNotFoundError, or ValueError where ``config.json`` is not an attachment's."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {path} should be a folder written by attachment.save()")
    record = read_json(file)
    if record.get("format") != FORMAT or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {record.get('format')!r}, version {record.get('format_version')!r}; this version of "
            f"cu_fast reads {FORMAT!r}, version {FORMAT_VERSION}"
        )
    try:
        layers = record["layers"].items()
        configs = {name: BottleneckConfig.from_dict(entry["config"]) for name, entry in layers}
        hashes = {name: entry["codebook_sha256"] for name, entry in layers}
        return Record(record["model_class"], record["model_type"], configs, hashes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe its layers: {error!r}") from error


def read_bottlenecks(path: Path, record: Record) -> dict[str, CodebookBottleneck]:
    """The bottlenecks, on the CPU, in the dtypes they were stored in.

    Raises:
        FileNotFoundError, or ValueError: a missing, unexpected or misshapen tensor, a damaged file, or a codebook
            that is not the one of the record.
    """
    with torch.device("meta"):  # no memory yet, and no random numbers
        bottlenecks = {name: CodebookBottleneck(config) for name, config in record.configs.items()}
    state = {f"{name}.{key}": value for name, b in bottlenecks.items() for key, value in b.state_dict().items()}
    file = path / "bottleneck.safetensors"
    tensors = read_safetensors(file, {key: tuple(value.shape) for key, value in state.items()})
    for key, value in tensors.items():
        allowed = FLOATS if state[key].is_floating_point() else (state[key].dtype,)
        if value.dtype not in allowed:
            raise ValueError(f"{file}: tensor {key!r} is {value.dtype}; it should be one of {allowed}")
    for name, bottleneck in bottlenecks.items():
        own = {key: tensors[f"{name}.{key}"] for key in bottleneck.state_dict()}
        bottleneck.to_empty(device="cpu").load_state_dict(own, assign=True)
        bottleneck.reset_receipt()
        bottleneck.codebook.reset_usage()
        if bottleneck.codebook_sha256() != record.hashes[name]:
            raise ValueError(f"{file}: the codebook of layer {name!r} is not the one in config.json (sha256 differs)")
    return bottlenecks


def mask_folders(path: Path) -> dict[str, Path]:
    """Name -> the folder that holds its masks."""
    return {urllib.parse.unquote(folder.name): folder for folder in sorted(path.glob("masks/*")) if folder.is_dir()}


def _is_replaceable(path: Path) -> bool:
    config = path / "config.json"
    return not any(path.iterdir()) or (config.is_file() and read_json(config).get("format") == FORMAT)
