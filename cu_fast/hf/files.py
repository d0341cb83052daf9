"""An attachment on disk: ``config.json``, ``bottleneck.safetensors``, ``masks/<name>/<number>/``. Knows no models.

``config.json`` holds checksums of itself, of the tensors and of every mask, by name: a folder that would compute
anything else than the saved attachment is refused. Checksums are no signature: a program that may write the folder can
also write checksums that fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from cu_fast.files import check_name, read_json, read_safetensors, seal, unseal, visible, write_directory
from cu_fast.hf.topics import Layer
from cu_fast.masks import FILES, Mask
from cu_fast.masks.rows import ROWS, SETTINGS
from cu_fast.nn import BottleneckConfig, CodebookBottleneck, Splice, SpliceKind
from cu_fast.ops.checks import FLOATS
from cu_fast.sae import SAE, Provenance, SAESplice

FORMAT = "cu_fast.attachment"
FORMAT_VERSION = 2
OWN_FILES = rf"config\.json|bottleneck\.safetensors|masks/[^/]+/\d+/{FILES}"
SAVE_AGAIN = "save the attachment again, or take the folder from where it was copied"


class Record(NamedTuple):
    """``config.json``: the model that the attachment was made for, and checksums of the other files.

    Attributes:
        model_class: name of the model's class, for messages.
        model_type: family in the model's config; None = it states none.
        configs: layer -> the config of its bottleneck, or what its autoencoder is besides weights.
        hashes: layer -> sha256 of its codebook or autoencoder.
        skip_first: positions at the start of each sequence that masks of a "delta" splice leave alone.
        tensors_sha256: of ``bottleneck.safetensors``.
        masks: name -> the checksum of each of its masks, in order.
    """

    model_class: str
    model_type: str | None
    configs: dict[str, BottleneckConfig | dict[str, Any]]
    hashes: dict[str, str]
    tensors_sha256: str
    masks: dict[str, list[str]]
    skip_first: int


def write(
    path: Path,
    layers: Sequence[Layer],
    masks: Mapping[str, tuple[Mask, ...]],
    model_class: str,
    model_type: str | None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        path: the folder.
        layers: the swapped layers.
        masks: name -> its masks.
        model_class: name of the model's class, for messages.
        model_type: family in the model's config; None = it states none.

    Raises:
        FileExistsError: anything but an attachment is there.
        ValueError: a mask's name that no file can have.
        RuntimeError: a splice that has rows of masks alone.
    """
    if path.exists() and not (path.is_dir() and _is_replaceable(path)):
        raise FileExistsError(f"{path} exists and is no attachment; give the name of a new folder")
    described, tensors, files, checksums = {}, {}, {}, {}
    for layer in layers:
        values, state = _parts_of(layer)
        described[layer.name] = {"codebook_sha256": layer.bottleneck.codebook_sha256(), **values}
        for key, value in state.items():
            tensors[f"{layer.name}.{key}"] = value.detach().cpu().contiguous()
    for name, parts in masks.items():
        folder, checksums[name] = _folder_of(name), []
        for number, mask in enumerate(parts):
            contents, sha256 = mask.to_files()
            checksums[name].append(sha256)
            files |= {f"{folder}/{number}/{file}": content for file, content in contents.items()}
    files["bottleneck.safetensors"] = safetensors.torch.save(tensors)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_class": model_class,
        "model_type": model_type,
        "layers": described,
        "skip_first": max(layer.skip_first for layer in layers),
        "tensors_sha256": hashlib.sha256(files["bottleneck.safetensors"]).hexdigest(),
        "masks": checksums,
    }
    files["config.json"], _ = seal(record, "config.json")
    write_directory(path, files, OWN_FILES)


def read_record(path: Path) -> Record:
    """``config.json`` of a folder, checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not an attachment's, of another version, or was changed after it was saved.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; {path} should be a folder written by attachment.save(), and an autoencoder's is given "
            f"as {{layer: folder}}"
        )
    record = read_json(file)
    if record.get("format") != FORMAT or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {record.get('format')!r}, version {record.get('format_version')!r}; this version of "
            f"cu_fast reads {FORMAT!r}, version {FORMAT_VERSION}. Load the folder with the version that wrote it (1: "
            f"cu_fast 0.1) and save it again with this one"
        )
    unseal(record, file, SAVE_AGAIN)
    try:
        layers = record["layers"].items()
        configs = {
            name: BottleneckConfig.from_dict(entry["config"]) if "config" in entry else _settings_of(entry["sae"])
            for name, entry in layers
        }
        hashes = {name: entry["codebook_sha256"] for name, entry in layers}
        masks = {name: list(checksums) for name, checksums in record["masks"].items()}
        for name in masks:
            _folder_of(name)  # raises for a name that no folder can have
        read = Record(record["model_class"], record["model_type"], configs, hashes, record["tensors_sha256"], masks,
                      record.get("skip_first", 0))  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} does not describe its layers and masks: {error!r}") from error
    texts = [
        read.model_class,
        "" if read.model_type is None else read.model_type,
        read.tensors_sha256,
        *hashes.values(),
    ]
    texts += itertools.chain.from_iterable(masks.values())
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{file} holds {wrong[0]!r} where a text should be")
    if type(read.skip_first) is not int or read.skip_first < 0:
        raise ValueError(f"{file} has skip_first {read.skip_first!r}; it should be an int, at least 0")
    return read


def _parts_of(layer: Layer) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """What the record says of a layer, and the tensors that belong to it."""
    splice = layer.bottleneck
    if isinstance(splice, CodebookBottleneck):
        config = dataclasses.replace(splice.config, mask_mode=splice.mask_mode)
        return {"config": config.to_dict()}, splice.state_dict()
    if splice.sae is None:
        raise RuntimeError(
            f"layer {layer.name!r} has rows of masks alone, and no autoencoder that could be saved; keep the masks"
        )
    sae, state = splice.sae, dict(zip(ROWS, splice.sae.rows()))
    if sae.b_dec is not None:
        state["b_dec"] = sae.b_dec
    said = {"family": sae.family, "provenance": dataclasses.asdict(sae.provenance), "has_b_dec": sae.b_dec is not None}
    sizes = {"num_latents": splice.num_codes, "d_in": splice.d_in, "d_out": splice.d_out}
    return {"sae": {**splice.settings, **sizes, **said}}, state


def _settings_of(values: dict[str, Any]) -> dict[str, Any]:
    known = {"num_latents", "d_in", "d_out", "family", "provenance", "has_b_dec", *SETTINGS}
    if set(values) != known:
        raise ValueError(f"an autoencoder's entry has the keys {sorted(values)}; they should be {sorted(known)}")
    if not all(type(values[name]) is int and values[name] >= 1 for name in ("num_latents", "d_in", "d_out")):
        raise ValueError(f"an autoencoder's sizes are {values!r}; they should be positive integers")
    return values


def read_splices(path: Path, record: Record, splice: SpliceKind | None = None) -> dict[str, Splice]:
    """The splices by layer, on the CPU, bottlenecks in the dtypes they were stored in.

    Args:
        path: the folder.
        record: what :func:`read_record` gave.
        splice: of bottlenecks, in place of what the record says; None = as it says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or not the one of the record; a missing, unexpected or misshapen tensor; a
            codebook that is not the one of the record; splice "replace" for an autoencoder.
    """
    configs = {name: config for name, config in record.configs.items() if isinstance(config, BottleneckConfig)}
    if splice is not None:
        configs = {name: dataclasses.replace(config, splice=splice) for name, config in configs.items()}
    released = {name: values for name, values in record.configs.items() if name not in configs}
    if splice == "replace" and released:
        raise ValueError(f"splice is 'replace', and layers {sorted(released)} have autoencoders; take 'delta'")
    try:
        with torch.device("meta"):  # no memory yet, and no random numbers
            bottlenecks = {name: CodebookBottleneck(config) for name, config in configs.items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path / 'config.json'} describes a bottleneck that cannot be made: {error}") from error
    state = {f"{name}.{key}": value for name, b in bottlenecks.items() for key, value in b.state_dict().items()}
    file = path / "bottleneck.safetensors"
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for name, values in released.items():
        C, d_in, d_out = values["num_latents"], values["d_in"], values["d_out"]
        sizes = {"enc": (C, d_in), "bias": (C,), "theta": (C,), "dec": (C, d_out)}
        if values["has_b_dec"]:
            sizes["b_dec"] = (d_out,)
        shapes |= {f"{name}.{key}": size for key, size in sizes.items()}
    tensors = read_safetensors(file, shapes, record.tensors_sha256)
    splices: dict[str, Splice] = dict(bottlenecks)
    for name, values in released.items():
        rows = [tensors.pop(f"{name}.{key}") for key in ROWS]
        try:
            said = {"family": values["family"], "provenance": Provenance(**values["provenance"])}
            settings = {key: values[key] for key in SETTINGS}
            splices[name] = SAESplice(SAE(*rows, **settings, **said, b_dec=tensors.pop(f"{name}.b_dec", None)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: the autoencoder of layer {name!r}: {error}") from error
    for key, value in tensors.items():
        allowed = FLOATS if state[key].is_floating_point() else (state[key].dtype,)
        if value.dtype not in allowed:
            raise ValueError(f"{file}: tensor {key!r} is {value.dtype}; it should be one of {allowed}")
    for name, bottleneck in bottlenecks.items():
        own = {key: tensors[f"{name}.{key}"] for key in bottleneck.state_dict()}
        bottleneck.to_empty(device="cpu").load_state_dict(own, assign=True)
        bottleneck.reset_receipt()
        bottleneck.codebook.reset_usage()
    for name, made in splices.items():
        if made.codebook_sha256() != record.hashes[name]:
            raise ValueError(f"{file}: the codebook of layer {name!r} is not the one in config.json (sha256 differs)")
    return {name: splices[name] for name in record.configs}


def read_masks(path: Path, record: Record) -> dict[str, list[Mask]]:
    """The masks by name, all that the record lists and no other. Hidden entries of the folder are passed over.

    Raises:
        FileNotFoundError: a file of a mask is missing.
        ValueError: a mask, or a layer's part of one, is missing, damaged, not listed, or not the one that was saved
            under its name.
    """
    folders = {name: path / _folder_of(name) for name in record.masks}
    _check_listed(path / "masks", [folder.name for folder in folders.values()])
    masks = {}
    for name, checksums in record.masks.items():
        folder = folders[name]
        _check_listed(folder, [str(number) for number in range(len(checksums))])
        masks[name] = [Mask.load(folder / str(number), sha256) for number, sha256 in enumerate(checksums)]
    return masks


def _check_listed(path: Path, names: list[str]) -> None:
    found = [entry.name for entry in visible(path)]
    missing, unlisted = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or unlisted:
        raise ValueError(
            f"{path} lacks {missing} and holds {unlisted}, which config.json does not list; put back what was saved, or "
            f"move the rest away (a mask is added with attachment.load_mask)"
        )


def _folder_of(name: str) -> str:
    """The folder of a mask's files. Its name is quoted, so that any mask name gives a file name, and never ".."."""
    try:
        folder = urllib.parse.quote(name, safe=" ").replace(".", "%2E")
    except UnicodeEncodeError as error:
        raise ValueError(f"a mask's name is {name!r}, which no file can have: {error}; give another name") from error
    check_name(folder, "a mask's name")
    return f"masks/{folder}"


def _is_replaceable(path: Path) -> bool:
    config = path / "config.json"
    return not any(path.iterdir()) or (config.is_file() and read_json(config).get("format") == FORMAT)
