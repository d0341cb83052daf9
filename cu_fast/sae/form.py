"""The one form that every released sparse autoencoder is brought into (section 9 of the contract).

    pre_i = w_i . (rho(x) x) + b_i      rho = 1, 1 / (std(x) + 1e-5) or norm / ||x||
    latent i fires: pre_i > theta_i and pre_i > 0; kind "topk": pre_i > 0, and among the k best of all latents
    a_i = pre_i where it fires, else 0
    it writes sigma(x) a_i v_i          sigma = 1, std(x) or ||x|| / norm

What a release adds to its output whatever fires is the same with and without a deleted latent: its decoder's bias is kept
for reconstructions alone, a skip connection is not kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cu_fast import ops
from cu_fast.masks import LatentRows
from cu_fast.ops.checks import check_choice, check_matrix, shape
from cu_fast.ops.choice import plain

Kind = ops.LatentKind
Scale = ops.TokenScale


@dataclass(frozen=True)
class Provenance:
    """What a release says of itself. Nothing is computed from it.

    Attributes:
        l0: latents that fire per token, on average; None = not stated.
        dtype: of the encoder in the file, as safetensors writes it: "F32", "BF16" or "F16"; None = not known.
        model: the model that it was made for, in the release's words; None = not stated.
    """

    l0: float | None = None
    dtype: str | None = None
    model: str | None = None


@dataclass(frozen=True, eq=False)
class SAE:
    """A released sparse autoencoder in the form above: C latents, of inputs of width Din and outputs of width Dout.

    Attributes:
        enc: fp32 [C, Din], w.
        bias: fp32 [C], b.
        theta: fp32 [C], what pre has to exceed; zeros for kind "topk".
        dec: fp32 [C, Dout], v.
        kind: "threshold" or "topk".
        k: latents kept per token, 1 <= k <= C; None for kind "threshold".
        scale: which rho and sigma: "none", "layer_norm" or "constant_norm".
        norm: of scale "constant_norm"; 1.0 for the others.
        site: where x is read, in the release's words; None = not stated.
        site_out: where the output is added, in the release's words; None = not stated, or the same place.
        family: the name of the format that it was read from; "" = made by hand.
        provenance: what the release says of itself.
        b_dec: fp32 [Dout], what is added to the sum of a_i v_i before sigma, whatever fires; None = not known, or not all
            that is added. Only :meth:`reconstruct` reads it.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: another shape, NaN or Inf, or a kind, k, scale or norm that do not go together.
    """

    enc: Tensor
    bias: Tensor
    theta: Tensor
    dec: Tensor
    kind: Kind = "threshold"
    k: int | None = None
    scale: Scale = "none"
    norm: float = 1.0
    site: str | None = None
    site_out: str | None = None
    family: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    b_dec: Tensor | None = None

    def __post_init__(self) -> None:
        check_matrix("enc", self.enc)
        check_matrix("dec", self.dec)
        C = self.num_latents
        for name, tensor, wanted in (
            ("enc", self.enc, [C, self.d_in]),
            ("bias", self.bias, [C]),
            ("theta", self.theta, [C]),
            ("dec", self.dec, [C, self.d_out]),
            *([] if self.b_dec is None else [("b_dec", self.b_dec, [self.d_out])]),
        ):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name} is {tensor.dtype}; it should be float32")
            if shape(tensor) != wanted or 0 in wanted:
                raise ValueError(
                    f"{name} has shape {shape(tensor)}; it should be {wanted}, with C = {C} latents, not empty"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or Inf in fp32; every weight should be finite")
        check_choice("kind", self.kind, ops.LATENT_KINDS)
        check_choice("scale", self.scale, ops.TOKEN_SCALES)
        if self.kind == "topk" and not (type(self.k) is int and 1 <= self.k <= C):
            raise ValueError(f"k is {self.k!r}; for kind 'topk' it should be an integer from 1 to C = {C}")
        if self.kind == "topk" and self.theta.any():
            raise ValueError("theta is not zero; for kind 'topk' it should be: which latents fire is decided by rank")
        if self.kind == "threshold" and self.k is not None:
            raise ValueError(f"k is {self.k!r}; for kind 'threshold' it should be None")
        if not 0 < self.norm < float("inf") or (self.scale != "constant_norm" and self.norm != 1):
            raise ValueError(f"norm is {self.norm!r}; it should be positive, and 1.0 unless scale is 'constant_norm'")

    @property
    def num_latents(self) -> int:
        """C."""
        return self.enc.shape[0]

    @property
    def d_in(self) -> int:
        """Din, the width of what it reads."""
        return self.enc.shape[1]

    @property
    def d_out(self) -> int:
        """Dout, the width of what it writes."""
        return self.dec.shape[1]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """enc, bias, theta and dec: per latent a row of each."""
        return self.enc, self.bias, self.theta, self.dec

    def settings(self) -> dict[str, Any]:
        """What computes and is no weight, and the sites: JSON values by name."""
        return {name: getattr(self, name) for name in ("kind", "k", "scale", "norm", "site", "site_out")}

    def rows_of(self, ids: Tensor) -> LatentRows:
        """The rows of some latents, in memory of their own, for a mask that is to serve without the autoencoder."""
        return LatentRows(*(row[ids.long().to(row.device)].cpu() for row in self.rows()), self.settings())

    def to(self, device: torch.device | str) -> SAE:
        """The same autoencoder on a device; itself where it is there."""
        if self.enc.device == torch.device(device):
            return self
        enc, bias, theta, dec = (row.to(device) for row in self.rows())
        b_dec = None if self.b_dec is None else self.b_dec.to(device)
        return replace(self, enc=enc, bias=bias, theta=theta, dec=dec, b_dec=b_dec)

    def activations(self, x: Tensor) -> Tensor:
        """What every latent is, for inspection: this builds [T, C], so keep T small.

        rho x is rounded to fp32; then the score, bias included (contract, section 2).

        Args:
            x: [T, Din], fp32, bf16 or fp16, on the device of the weights.

        Returns:
            a, fp32 [T, C]; 0 where a latent does not fire. A row with NaN or Inf in x is NaN, and so is a row of zeros
            under scale "constant_norm".

        Raises:
            ValueError: x has another shape or device.
            TypeError: x has another dtype.
            RuntimeError: x requires grad.
        """
        x = self.scaled(x)
        pre = ops.sae_encode(x, self._packed, activation="none")
        fires = (pre > self.theta) & (pre > 0)
        if self.kind == "topk":
            fires &= self._among_best(x, pre)
        return torch.where(fires | pre.isnan(), pre, 0.0)

    @property
    def _packed(self) -> ops.PackedCodes:
        """The encoder as the operators take it, packed again where its tensors were written to since."""
        now = tuple((row.data_ptr(), -1 if row.is_inference() else row._version) for row in (self.enc, self.bias))
        known = self.__dict__.get("_last_packed")
        if known is None or known[0] != now:
            scan = "auto" if self.kind == "topk" else "none"
            known = self.__dict__["_last_packed"] = now, ops.pack_codes(self.enc, "dot", self.bias, scan)
        return known[1]

    def decode(self, activations: Tensor, x: Tensor | None = None) -> Tensor:
        """What activations write: sigma(x) times the sum of a_i v_i, for inspection.

        This is the release's reconstruction without what it adds whatever fires: see the module's docstring. The sum runs
        in the order of the ids, in fp32.

        Args:
            activations: [T, C], fp32, as :meth:`activations` gave it, or changed.
            x: [T, Din], what it was given, for sigma; None where scale is "none".

        Returns:
            fp32 [T, Dout].

        Raises:
            ValueError: a wrong shape, or no x where scale is not "none".
            TypeError: a wrong dtype.
            RuntimeError: an input requires grad.
        """
        check_matrix("activations", activations, width=self.num_latents, of="the transposed dec")
        if self.scale != "none" and x is None:
            raise ValueError(f"x is None; with scale {self.scale!r} it should be what activations() was given")
        ids = torch.arange(self.num_latents, dtype=torch.int32, device=activations.device).expand(activations.shape)
        y = ops.masked_decode(ids, activations, self.dec)
        if self.scale == "none":
            return y
        check_matrix("x", x, width=self.d_in, of="enc")
        if len(x) != len(activations):
            raise ValueError(f"x has {len(x)} rows; it should have {len(activations)}, as activations has")
        return y * self._token_scales(x)[1][:, None]

    def reconstruct(self, x: Tensor) -> Tensor:
        """What the release makes of x in place of its output: for explained variance, on a few tokens.

        sigma(x) times the sum of a_i v_i + b_dec; under scale "layer_norm" the mean of x is added back.

        Args:
            x: [T, Din], fp32, bf16 or fp16, on the device of the weights.

        Returns:
            fp32 [T, Dout]: of an autoencoder an estimate of x, of a transcoder one of what it stands for.

        Raises:
            ValueError: b_dec is None, or x has another shape or device.
            TypeError: x has another dtype.
            RuntimeError: x requires grad.
        """
        if self.b_dec is None:
            raise ValueError(
                "b_dec is None; for a reconstruction it should be what the release adds to its output. Releases with a skip "
                "connection, and of models with centred weights, have none: take decode(), and compare differences"
            )
        # A figure, so a library's product: the sum in the order of the ids would read all of dec per token.
        y = self.activations(x) @ self.dec + self.b_dec
        if self.scale != "none":
            y = y * self._token_scales(x)[1][:, None]
        return y + x.double().mean(1, keepdim=True).float() if self.scale == "layer_norm" else y

    def sha256(self) -> str:
        """Its identity: sha256 of all that computes (kind, k, scale, norm, shapes, weights), and of nothing else."""
        head = f"{self.kind} {self.k} {self.scale} {float(self.norm)!r} {shape(self.enc)} {shape(self.dec)} "
        digest = hashlib.sha256(head.encode())
        for tensor in (self.enc, self.bias, self.theta, self.dec):
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _token_scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rho, sigma), fp32 [T] each."""
        return plain("token_scales")(x, ops.TOKEN_SCALES.index(self.scale), self.norm)

    def scaled(self, x: Tensor) -> Tensor:
        """rho x: [T, Din] -> fp32 [T, Din]; x itself where scale is "none"."""
        check_matrix("x", x, width=self.d_in, of="enc")
        if self.scale == "none":
            return x
        return x.float() * self._token_scales(x)[0][:, None]

    def _among_best(self, x: Tensor, pre: Tensor) -> Tensor:
        """bool [T, C]: which latents are the k best: higher pre first, at equal pre the smaller id."""
        ids = ops.sae_encode(x, self._packed, activation="none", k=self.k).ids.long()
        best = torch.zeros(len(pre), self.num_latents + 1, dtype=torch.bool, device=pre.device)
        best.scatter_(1, ids.where(ids >= 0, self.num_latents), True)  # an empty slot goes to a column of its own
        return best[:, :-1]
