"""Sparse autoencoders: read from the files of a release into one form (:class:`SAE`), written, put at a layer of a model.

One file per family of formats; each names in its header the rules by which it is folded.
"""

from __future__ import annotations

from cu_fast.sae.form import SAE, Kind, Provenance, Scale
from cu_fast.sae.load import convert_sae, load_sae
from cu_fast.sae.save import save_sae
from cu_fast.sae.splice import SAESplice

__all__ = ["SAE", "Kind", "Provenance", "SAESplice", "Scale", "convert_sae", "load_sae", "save_sae"]
