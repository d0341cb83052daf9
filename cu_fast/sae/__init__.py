"""Released sparse autoencoders: read from their own files into one form (:class:`SAE`), to be looked at.

One file per family of formats; each names in its header the rules by which it is folded.
"""

from __future__ import annotations

from pathlib import Path

from cu_fast.sae import gemma_scope, gemma_scope_2, llama_scope, sae_lens, sparsify
from cu_fast.sae.form import SAE, Kind, Provenance, Scale
from cu_fast.sae.released import entries, names_in
from cu_fast.sae.splice import SAESplice

__all__ = ["SAE", "Kind", "Provenance", "SAESplice", "Scale", "load_sae"]

FAMILIES = (gemma_scope, gemma_scope_2, llama_scope, sae_lens, sparsify)
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
SHOWN = 12  # names in a message


def load_sae(folder: str | Path) -> SAE:
    """A released sparse autoencoder, from the folder that holds its files as they were released.

    The family is told by the names of the files and the keys of their tensors. Nothing is unpickled.

    Args:
        folder: the innermost one: of this autoencoder alone. One of Gemma Scope keeps the release's folders around it,
            which say what its file does not.

    Returns:
        The autoencoder, on the CPU, in memory of its own.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no family, or several, know the files; a file is damaged, or says what no rule is known for.
    """
    folder = Path(folder).absolute()  # of links the name as it was given: those of a download cache are the release's
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one that holds the autoencoder's files")
    files = names_in(folder)
    keys = {name: set(entries(folder / name)) for name in files if Path(name).suffix in (".safetensors", ".npz")}
    families = [family for family in FAMILIES if family.recognises(files, keys)]
    if len(families) == 1:
        return families[0].read(folder)
    seen = f"{folder} holds {_listed(files)}" + "".join(f"; {name}: {_listed(sorted(keys[name]))}" for name in keys)
    if families:
        names = " and ".join(family.NAME for family in families)
        raise ValueError(f"{seen}. That is both {names}; leave the files of one release in the folder")
    wants = "; ".join(f"{family.NAME}: {family.WANTS}" for family in FAMILIES)
    pickles = [name for name in files if Path(name).suffix in PICKLES]
    advice = (
        f" {_listed(pickles)} may be pickled, and is not read: convert the tensors to safetensors first, under the names "
        f"of one of these families."
        if pickles
        else ""
    )
    raise ValueError(f"{seen}. No family that is known has these. They are {wants}.{advice}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more
