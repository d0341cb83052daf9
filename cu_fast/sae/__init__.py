"""Released sparse autoencoders: read from their own files into one form (:class:`SAE`), to be looked at; and written.

One file per family of formats; each names in its header the rules by which it is folded.
"""

from __future__ import annotations

from cu_fast.sae.form import SAE, Kind, Provenance, Scale
from cu_fast.sae.load import convert_sae, load_sae
from cu_fast.sae.save import save_sae

__all__ = ["SAE", "Kind", "Provenance", "Scale", "convert_sae", "load_sae", "save_sae"]
