"""SAESplice: a released sparse autoencoder at a layer of a model that was never trained with it.

The hidden state is kept; what deleted latents wrote is taken out of it (``ops.delete_latents``). On the layer's device are
the rows of those latents alone that a mask in use changes; for kind "topk", whose rank needs all, the whole autoencoder.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.masks import LatentRows, Mask
from cu_fast.nn import Splice
from cu_fast.sae.form import SAE

STRENGTH = 4.0  # how many times what a deleted latent wrote is taken out, unless the mask says otherwise
TILE = 2**22  # activations that are looked at together: 16 MiB


class SAESplice(Splice):
    """What leaves a place of a model, without what deleted latents wrote.

    No parameters, no state: what is here is neither trained nor cast nor saved with the model.

    Args:
        sae: the autoencoder, on the CPU; or, to serve masks that carry their rows, what one of them says of it.

    Attributes:
        sae: the autoencoder; None where masks bring their rows.
        settings: what computes and is no weight: kind, k, scale, norm, widths, sites.
    """

    splice, strength, mask_mode, has_latents = "delta", STRENGTH, "ablate", True

    def __init__(self, sae: SAE | LatentRows, num_codes: int | None = None, sha256: str | None = None) -> None:
        super().__init__()
        self.impl: ops.Impl = "auto"
        self.sae = sae if isinstance(sae, SAE) else None
        self.settings = sae.settings()
        self.k = self.settings["k"]
        self.num_codes = sae.num_latents if isinstance(sae, SAE) else num_codes
        self.d_in, self.d_out = sae.enc.shape[1], sae.dec.shape[1]
        self._sha256 = sae.sha256() if isinstance(sae, SAE) else sha256
        self._version = self._version_now()
        self._lock = threading.Lock()
        self._row_of: dict[int, int] = {}  # latent -> row of _latents
        self._outgrown: list[ops.Latents] = []  # kernels may still read them
        self._whole: tuple[SAE, SAE] | None = None  # the autoencoder, and the same on the device that asked for it last
        self._judged = WeakTensorKeyDictionary()  # a gate's latents -> their rows, as long as somebody has the former
        if self.settings["kind"] == "topk":
            if self.sae is None:
                raise ValueError(
                    "the mask's autoencoder keeps its k best latents, and their rank needs all of them; attach the "
                    "autoencoder itself"
                )
            self._latents = self._of(*self.sae.rows(), scan="auto")
        else:
            self._latents = self._of(*(torch.zeros(64, *row.shape[1:]) for row in sae.rows()))

    def _of(self, enc: Tensor, bias: Tensor, theta: Tensor, dec: Tensor, scan: ops.Scan = "none") -> ops.Latents:
        settings = (self.settings[name] for name in ("kind", "k", "scale", "norm"))
        return ops.Latents(ops.pack_codes(enc, "dot", bias, scan), theta, dec, *settings)

    def codebook_sha256(self) -> str:
        """The autoencoder's: another one, where its tensors were written to since."""
        if (version := self._version_now()) != self._version:
            self._sha256, self._version = self.sae.sha256(), version
        return self._sha256

    def _version_now(self) -> tuple:
        rows = () if self.sae is None else self.sae.rows()
        return tuple((row.data_ptr(), -1 if row.is_inference() else row._version) for row in rows)

    def check_mask(self, mask: Mask) -> None:
        """Raises ValueError where rows are needed that neither the autoencoder nor the mask has, or too many latents."""
        check_number(mask.num_deleted)
        if self.sae is None and mask.rows is None:
            raise ValueError(
                f"mask {mask.topic!r} carries no rows, and the model was given no autoencoder; save it with rows=True"
            )

    def row_of(self, masks: Sequence[Mask]) -> tuple[Tensor, ...]:
        """A table's row that holds all of these masks; the rows of their latents are brought to the device."""
        ids, change = super().row_of(masks)
        check_number(len(ids))  # before the table is widened for it
        if self.settings["kind"] == "topk":
            return ids, change
        with self._lock:
            for mask in masks:
                self._bring(mask)
            return torch.tensor([self._row_of[latent] for latent in ids.tolist()], dtype=torch.int32), change

    def after_fork(self) -> None:
        """In the new process: a lock that another thread of the old process held is free."""
        self._lock = threading.Lock()

    def _bring(self, mask: Mask) -> None:
        """Append the rows of a mask's latents that are not there yet."""
        ids = mask.ids()
        new = torch.tensor([latent not in self._row_of for latent in ids.tolist()], dtype=torch.bool)
        if not new.any():
            return
        rows = [row[ids[new]] for row in self.sae.rows()] if self.sae else [row[new] for row in mask.rows.rows()]
        start, needed = len(self._row_of), len(self._row_of) + int(new.sum())
        if needed > len(self._latents.theta):
            self._outgrown.append(self._latents)
            size = 1 << (needed - 1).bit_length()
            *enc, theta, dec = (
                torch.cat([old, old.new_zeros(size - len(old), *old.shape[1:])]) for old in _tensors_of(self._latents)
            )
            packed = self._latents.enc
            enc = ops.PackedCodes(*enc, packed.width, packed.similarity)
            self._latents = self._latents._replace(enc=enc, theta=theta, dec=dec)
        for whole, row in zip(_tensors_of(self._latents), _tensors_of(self._of(*rows))):
            whole[start:needed] = row.to(whole.device)
        self._row_of |= {latent: start + i for i, latent in enumerate(ids[new].tolist())}

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        masks: ops.LatentMasks | None = None,
        mask_row: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """What leaves the place that is changed.

        Args:
            x: [..., d_in], what the autoencoder reads; the leading dimensions are flattened to T tokens.
            masks: a table of masks whose latents are rows of this splice; None = nothing deleted.
            mask_row: int32 [T], -1 = nothing deleted; None where masks is.
            residual: [..., d_out], what is changed; None = x.

        Returns:
            The residual itself where nothing is deleted; else a new tensor of its shape and dtype.

        Raises:
            RuntimeError: a mask in training mode.
        """
        kept = x if residual is None else residual
        if masks is None:
            return kept
        if self.training:
            raise RuntimeError("a mask is active but the splice is in training mode; call model.eval() first")
        latents = self._on(x.device)
        found = ops.delete_latents(
            x.detach().reshape(-1, self.d_in), latents, masks, mask_row,
            residual=None if residual is None else residual.detach().reshape(-1, self.d_out), impl=self.impl,
        )  # fmt: skip
        self._count(found.hits, found.dose, mask_row)
        return found.y.reshape(kept.shape)

    def constants(self) -> tuple[Any, ...]:
        """What a forward reads that is replaced, and not written to, when it changes."""
        return (self._latents,)

    def _on(self, device: torch.device) -> ops.Latents:
        if self._latents.theta.device != device:
            with self._lock, torch.inference_mode(False):  # rows are written to these tensors later
                enc, theta, dec, *settings = self._latents
                self._latents = ops.Latents(enc.to(device), theta.to(device), dec.to(device), *settings)
        return self._latents

    def _whole_on(self, device: torch.device) -> SAE:
        if self._whole is None or self._whole[0] is not self.sae or self._whole[1].enc.device != device:
            self._whole = self.sae, self.sae.to(device)
        return self._whole[1]

    @torch.no_grad()
    def active(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Which latents fire at each token, in ascending order; with a depth the ``depth`` best of a "topk" one.

        Args:
            x: [..., d_in]; the leading dimensions are flattened to T tokens.
            depth: latents looked at per token, for kind "topk" alone; None = those that fire.

        Returns:
            int32 [T, n], on x's device; -1 fills rows that have fewer. At a token with NaN or Inf none fires.

        Raises:
            RuntimeError: the masks brought their rows, and there is no autoencoder.
            ValueError: a depth for kind "threshold".
        """
        if self.sae is None:
            raise RuntimeError("only rows of masks are here; attach the autoencoder itself to find or count latents")
        x = x.detach().reshape(-1, self.d_in)
        if self.settings["kind"] == "topk":
            return self._best(x, depth or self.k)
        if depth is not None:
            raise ValueError(f"depth is {depth}; for latents with a threshold it should be None: all that fire count")
        sae = self._whole_on(x.device)
        tile = max(1, TILE // self.num_codes)
        fires = [(sae.activations(part) > 0).nonzero() for part in x.split(tile)]
        token = torch.cat([found[:, 0] + i * tile for i, found in enumerate(fires)])
        latent = torch.cat([found[:, 1] for found in fires])
        counts = torch.bincount(token, minlength=len(x))
        place = torch.arange(len(token), device=x.device) - (counts.cumsum(0) - counts)[token]
        ids = torch.full((len(x), int(counts.max()) if len(x) else 0), -1, dtype=torch.int32, device=x.device)
        ids[token, place] = latent.int()
        return ids

    @torch.no_grad()
    def keeps(self, x: Tensor, codes: Tensor, rows: LatentRows | None = None) -> Tensor:
        """Which of some latents fire; those with a threshold are computed alone. See :meth:`Splice.keeps`.

        Raises:
            RuntimeError: there is no autoencoder, and there are no rows.
        """
        if self.settings["kind"] == "topk":
            return super().keeps(x, codes)
        known = self._judged.get(codes)
        if known is None or known.enc.device != x.device:
            if rows is None and self.sae is None:
                raise RuntimeError(
                    "the gate carries no rows, and there is no autoencoder; save its mask with rows=True"
                )
            rows = self.sae.rows_of(codes) if rows is None else rows
            known = self._judged[codes] = SAE(*rows.rows(), **self.settings).to(x.device)
        return known.activations(x.detach().reshape(-1, self.d_in)) > 0

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor | None:
        """What the release makes of x in place of its output: fp32 [T, d_out]; None where its biases are not known."""
        if self.sae is None or self.sae.b_dec is None:
            return None
        sae = self._whole_on(x.device)
        parts = x.detach().split(max(1, TILE // self.num_codes))
        return torch.cat([sae.reconstruct(part) for part in parts])

    def _best(self, x: Tensor, k: int) -> Tensor:
        latents = self._on(x.device)
        scaled = self.sae.scaled(x)
        scores, ids, _ = ops.sae_encode(scaled, latents.enc, activation="none", k=k, impl=self.impl)
        return torch.where(scores > 0, ids, -1)

    def receipt(self) -> dict[str, Any]:
        """What ran in evaluation since ``reset_receipt()``.

        Returns:
            impl: "reference", "cpu", "cuda" or "triton".
            scan: "int8", or "none": every latent is scored, or latents have a threshold.
            tokens: how many passed under a request that deletes.
            hits: how many latents that fired masks changed.

        Raises:
            ValueError, RuntimeError: ``impl`` is unknown, or cannot run.
        """
        self._settle()
        tokens, hits = self.passed.tolist()
        impl = ops.resolve(self.impl, self._latents.theta.device)
        scan = "none" if self._latents.enc.scan is None else "int8"
        return {"impl": impl, "scan": scan, "tokens": tokens, "hits": hits}

    def erase(self, ids: Tensor) -> Tensor:
        """Raises RuntimeError: the weights of the model still hold what latents read out of it."""
        raise RuntimeError(
            "a splice that keeps the hidden state cannot erase: the model's weights still hold the topic"
        )


def _tensors_of(latents: ops.Latents) -> tuple[Tensor, ...]:
    """What has a row per latent."""
    return *latents.enc[:3], latents.theta, latents.dec


def check_number(latents: int) -> None:
    """Raises ValueError for more latents than one mask, or what holds together, may change."""
    if latents > reference.MAX_LATENTS:
        raise ValueError(f"masks change {latents} latents together; at most {reference.MAX_LATENTS} can be changed")
