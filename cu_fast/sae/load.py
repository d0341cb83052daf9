"""Tells the family of a release by its files and their tensors, and reads it; for `cu-fast sae convert`, pickles too."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from cu_fast.sae import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    mwhanna,
    openai,
    openmoss,
    qwen_scope,
    sae_lens,
    sparsify,
)
from cu_fast.sae.form import SAE
from cu_fast.sae.released import Source, names_in, unpickled
from cu_fast.sae.save import save_sae

# A family is a module with NAME; FILE, a pattern for the name of its file of tensors; KEYS, sets of which the file holds one;
# CONFIG, what has to be beside it, or None; and read(source).
FAMILIES: tuple[ModuleType, ...] = (
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openmoss,
    sae_lens,
    sparsify,
    dictionary_learning,
    qwen_scope,
    openai,
    goodfire,
    mwhanna,
)
PLAIN = (".safetensors", ".npz")
CONVERTED = (".pt", ".pth")
PICKLES = (*CONVERTED, ".pkl", ".pickle", ".bin", ".ckpt")
SHOWN = 12  # names in a message


def load_sae(path: str | Path, k: int | None = None) -> SAE:
    """A released sparse autoencoder, from its files as they were released, or as :func:`save_sae` wrote them.

    The family is told by the names of the files and the keys of their tensors. Nothing is unpickled.

    Args:
        path: the innermost folder: of this autoencoder alone. Where a release has a file per layer in one folder, the file.
            One of Gemma Scope keeps the release's folders around it, which say what its file does not.
        k: latents kept per token, where the release does not say it; None = it does.

    Returns:
        The autoencoder, on the CPU, in memory of its own.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: no family, or several, know the files; a file is damaged, or says what no rule is known for; the release
            says another k.
    """
    return _load(path, k, pickles=False)


def convert_sae(source: str | Path, folder: str | Path, k: int | None = None) -> SAE:
    """Read a released sparse autoencoder, and write it as :func:`save_sae` does: for releases that are pickles.

    Of a pickle (.pt, .pth) tensors and plain values are read. No object in it is made, and none of its code runs.

    Args:
        source: as for :func:`load_sae`; of a folder a pickle is read where nothing else in it is known.
        folder: is written: a new one, or one that holds such an autoencoder, which is replaced.
        k: as for :func:`load_sae`.

    Returns:
        The autoencoder, as ``load_sae(folder)`` gives it but for what only the release says: its family.

    Raises:
        FileNotFoundError: there is no such folder or file.
        FileExistsError: the folder holds other files.
        ValueError: as of :func:`load_sae` and :func:`save_sae`; the folder is the release's own; a pickle holds objects.
    """
    source, folder = Path(source), Path(folder)
    if folder.resolve() in (source.resolve(), source.resolve().parent):
        raise ValueError(f"folder is {folder}, which holds the release itself; it should be another")
    sae = _load(source, k, pickles=True)
    save_sae(sae, folder)
    return sae


def _load(path: str | Path, k: int | None, pickles: bool) -> SAE:
    path = Path(path).absolute()  # of links the name as it was given: those of a download cache are the release's
    if k is not None and (type(k) is not int or k < 1):
        raise ValueError(f"k is {k!r}; it should be a positive integer, or None")
    if path.is_dir():
        folder, files = path, names_in(path)
    elif path.is_file():
        folder, files = path.parent, [path.name]
    else:
        raise FileNotFoundError(
            f"{path} is no folder; give the one that holds the autoencoder's files, or one of the files"
        )
    sources = [Source(folder, name, k) for name in files if Path(name).suffix in PLAIN]
    found = [(family, source) for source in sources for family in FAMILIES if recognised(family, source)]
    pickled = [name for name in files if Path(name).suffix in PICKLES]
    if pickles and not found:
        wanted = [name for name in files if Path(name).suffix in CONVERTED]
        if path.is_dir():  # others are not opened
            wanted = [name for name in wanted if any(_named(family, name) for family in FAMILIES)]
            _refuse_several(folder, wanted)
        sources += [Source(folder, name, k, unpickled(folder / name)) for name in wanted]
        found = [(family, source) for source in sources for family in FAMILIES if recognised(family, source)]
    if len(found) == 1:
        ((family, source),) = found
        sae = family.read(source)
        if k is not None and sae.k != k:
            raise ValueError(f"k is {k}; it should be {sae.k}, as {source.path} says, or not be given")
        return sae
    names = [family.NAME for family in FAMILIES if any(family is other for other, _ in found)]
    if len(names) == 1:
        _refuse_several(folder, [source.name for _, source in found])
    seen = f"{folder} holds {_listed(files)}" if path.is_dir() else f"{path} was given"
    seen += "".join(f"; {source.name}: {_listed(sorted(source.entries))}" for source in sources)
    if found:
        raise ValueError(f"{seen}. That is both {' and '.join(names)}; leave the files of one release in the folder")
    if any(".codebook_layer." in key for source in sources for key in source.entries):
        raise ValueError(
            f"{seen}. That is a model of codebook-features: it was trained anew with its codebooks, and none of its layers is "
            f"an autoencoder beside a model. It is not read"
        )
    wants = "; ".join(f"{family.NAME}: {_wants(family)}" for family in FAMILIES)
    raise ValueError(f"{seen}. No family that is known has these. They are {wants}.{_advice(pickled, pickles)}")


def recognised(family: ModuleType, source: Source) -> bool:
    """Whether a file is one of a family: by its name, its keys and what is beside it."""
    beside = family.CONFIG is None or (source.folder / family.CONFIG).is_file()
    return beside and _named(family, source.name) and any(set(keys) <= set(source.entries) for keys in family.KEYS)


def _named(family: ModuleType, name: str) -> bool:
    return name.count("/") == family.FILE.count("/") and fnmatchcase(name, family.FILE)


def _wants(family: ModuleType) -> str:
    config = f"{family.CONFIG}, " if family.CONFIG else ""
    return f"{config}{family.FILE} with " + " or ".join(", ".join(keys) for keys in family.KEYS[:2])


def _refuse_several(folder: Path, names: list[str]) -> None:
    if len(names) > 1:
        raise ValueError(f"{folder} holds several autoencoders: {_listed(names)}; give the path of one file")


def _advice(pickled: list[str], opened: bool) -> str:
    if not pickled:
        return ""
    if opened:
        return f" Of pickles those are read that are called as one of these, or given themselves: {_listed(pickled)}."
    return (
        f" {_listed(pickled)} may be pickled, and is not read: run `cu-fast sae convert`, which takes the tensors out of a "
        f".pt or .pth file, and load the folder that it writes."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more
