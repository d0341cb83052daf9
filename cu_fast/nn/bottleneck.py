"""CodebookBottleneck: what CodeUnlearn puts into a model, a SparseAutoencoder with a Codebook in its middle.

    x [..., D] -> z = act((x / rms - b_pre) W_enc^T + b_enc) [T, E]
               -> the k codes most similar to z
               -> y = rms * ((sum_i w_i codes[ids_i]) W_dec^T + b_dec) [..., D]

Sources: CodeUnlearn (arXiv 2410.10866), Codebook Features (arXiv 2310.17230), TopK-SAE (arXiv 2406.04093).

With splice "delta" y is x, but for what deleted codes would have decoded to: see ``cu_fast.nn.splice``.

In training the same exact selection is made; the gradient passes it straight through (to z as if y came from z,
to the codes as usual), and ``auxiliary_loss()`` holds the reconstruction, commitment, codebook and L1 terms.
In evaluation the decoder is folded into a table, [C, D], so that decoding gathers k rows; there is no autograd.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cu_fast import ops
from cu_fast.kernels import reference
from cu_fast.nn.autoencoder import SparseAutoencoder
from cu_fast.nn.codebook import Codebook
from cu_fast.nn.config import BottleneckConfig
from cu_fast.nn.training import TrainingPath

# A folded table larger than this, and larger than the codes, is not built: decode goes through W_dec instead.
# Shapes and dtype alone decide, so that every machine takes the same path.
FOLD_LIMIT_BYTES = 2**30
STRENGTH = 2.0  # how many times a delta splice takes out what a deleted code wrote, unless the mask says otherwise
SAMPLE = 509  # elements of a parameter that refresh() compares; a prime, so that they lie in different columns


class Folded(NamedTuple):
    """What evaluation reads.

    Attributes:
        codes: the codebook's.
        table: [C, D], what each code decodes to; None where that would be too large.
        W_enc: encoder over the scale, with b_enc; None without an autoencoder, like the next three.
        b_pre: fp32 [D], times the scale.
        W_dec: decoder times the scale, without its bias.
        b_dec: fp32 [D], times the scale.
    """

    codes: ops.PackedCodes
    table: Tensor | None
    W_enc: ops.PackedCodes | None = None
    b_pre: Tensor | None = None
    W_dec: ops.PackedCodes | None = None
    b_dec: Tensor | None = None


class CodebookBottleneck(TrainingPath):
    """x [..., D] -> y [..., D], through the k codes most similar to each token.

    Parameters keep their own dtype. x may have any floating dtype, and y has that of x.

    Args:
        config: the shape and the training terms.

    Attributes:
        mask_mode: "ablate" or "reselect"; may be changed at any time.
        impl: passed to every operator; may be changed at any time.
        scan: passed to ``ops.pack_codes``; call ``fold()`` after changing it.
        rms: fp32 [], the scale that x is divided by.
    """

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_mode: ops.MaskMode = config.mask_mode
        self.impl: ops.Impl = "auto"
        self.scan: ops.Scan = "auto"
        self.splice, self.strength = config.splice, STRENGTH if config.splice == "delta" else 1.0
        self.autoencoder = (
            SparseAutoencoder(config.d_model, config.code_dim, config.activation) if config.autoencoder else None
        )
        self.codebook = Codebook(config.num_codes, config.code_dim, config.similarity)
        self.register_buffer("rms", torch.ones((), dtype=torch.float32))
        self.register_buffer("rms_steps", torch.zeros((), dtype=torch.int64))
        self.folded: Folded | None = None
        self._folded_version: list[tuple[int, int]] | None = None
        self._folded_sample: Tensor | None = None
        self._sha256: tuple[tuple, str] | None = None
        self.register_load_state_dict_post_hook(_fold_loaded)

    @property
    def num_codes(self) -> int:
        """C."""
        return self.config.num_codes

    @property
    def k(self) -> int:
        """Codes kept per token."""
        return self.config.k

    @property
    def d_in(self) -> int:
        """D."""
        return self.config.d_model

    d_out = d_in

    def forward(
        self, x: Tensor, mask_table: Tensor | ops.LatentMasks | None = None, mask_row: Tensor | None = None
    ) -> Tensor:
        """The bottleneck's output, [..., D] in x's dtype.

        Args:
            x: [..., D]; the leading dimensions are flattened to T tokens.
            mask_table: int32 [U, ceil(C/32)], see ``cu_fast.ops``; with splice "delta" ``ops.LatentMasks``, whose latents
                are codes. None = nothing deleted.
            mask_row: int32 [T], -1 = nothing deleted; None where mask_table is.

        Raises:
            RuntimeError: a mask in training mode (deletion is for evaluation: call ``model.eval()``).
        """
        if self.training:
            if mask_table is not None:
                raise RuntimeError("a mask is active but the bottleneck is in training mode; call model.eval() first")
            return self._forward_training(x)
        if self.splice == "delta" and mask_table is None:
            return x
        if not torch.is_grad_enabled():  # no_grad alone takes a microsecond
            return self._evaluate(x, mask_table, mask_row)
        with torch.no_grad():
            y = self._evaluate(x.detach(), mask_table, mask_row)
        if x.requires_grad and not torch.compiler.is_compiling():
            y = refuse_gradient(x, y)
        return y

    # -- evaluation ------------------------------------------------------------------------------------------

    def _evaluate(self, x: Tensor, mask_table: Tensor | ops.LatentMasks | None, mask_row: Tensor | None) -> Tensor:
        D, compute = self.config.d_model, self._delete if self.splice == "delta" else self._forward_inference
        shape, dtype = x.shape, x.dtype
        is_flat = len(shape) == 2 and shape[1] == D
        y = compute(x if is_flat else x.reshape(-1, D), mask_table, mask_row)
        if y.dtype is not dtype:
            y = y.to(dtype)
        return y if is_flat else y.reshape(shape)

    def _forward_inference(self, x: Tensor, mask_table: Tensor | None, mask_row: Tensor | None) -> Tensor:
        self._check_folded()
        config, folded = self.config, self.folded
        if folded.table is None:
            return self._decode_through(x, mask_table, mask_row)
        return ops.codebook_bottleneck(
            x.float() / self.rms if folded.W_enc is None else x,
            self._encoder(), folded.codes, folded.table, folded.b_dec, mask_table, mask_row, k=config.k,
            activation=config.activation, mask_mode=self.mask_mode, weight=config.weight,
            receipt=self._buffers["passed"], impl=self.impl,
        )  # fmt: skip

    def _delete(self, x: Tensor, masks: ops.LatentMasks, mask_row: Tensor) -> Tensor:
        """x without what the deleted codes among each token's k decode to (contract, section 9)."""
        self._check_folded()
        scores, ids, _ = self._select(x, self.config.k)
        score_weights, mean = self.config.weight == "score", self.config.weight == "mean"
        changes = ops.choice.plain("code_changes")
        change, deleted = changes(ids, scores, *masks, mask_row, self.config.num_codes, score_weights, mean)
        # A row with NaN or Inf has no ids, and the weight NaN, which makes its row NaN.
        ids = torch.where(deleted, ids, -1)
        if self.folded.table is None:
            q = ops.masked_decode(ids, change, self.codebook.codes.detach().float(), impl=self.impl)
            delta = ops.sae_encode(q, self.folded.W_dec, activation="none", impl=self.impl)
        else:
            delta = ops.masked_decode(ids, change, self.folded.table, impl=self.impl)
        hits, faulty = deleted.sum(1), change.isnan().any(1)
        dose = torch.where(hits > 0, delta.norm(dim=1) / x.float().norm(dim=1), 0.0)
        self._count(hits, dose, mask_row)
        changed = ((hits > 0) | faulty)[:, None]
        return torch.where(changed, (x.float() + delta).to(x.dtype), x)

    def _decode_through(self, x: Tensor, mask_table: Tensor | None, mask_row: Tensor | None) -> Tensor:
        """The same without a folded table, which would be too large: codes are summed, the sum goes through W_dec."""
        masked = {"mask_table": mask_table, "mask_row": mask_row}
        reselect = mask_table is not None and self.mask_mode == "reselect"
        scores, ids, hits = self._select(x, self.config.k, return_hits=reselect, **(masked if reselect else {}))
        if mask_table is not None and not reselect:
            hits = reference.is_deleted(ids, mask_table, mask_row)
        self.passed[0] += x.shape[0]
        if mask_table is not None:
            self.passed[1] += hits.sum()
        # The score of an empty slot is 0, or NaN where the row was faulty, and so is its weight.
        weights = torch.relu(scores) if self.config.weight == "score" else torch.where(ids < 0, scores, 1.0)
        reduce = "mean" if self.config.weight == "mean" else "sum"
        q = ops.masked_decode(
            ids, weights, self.codebook.codes.detach(), reduce=reduce, impl=self.impl, **({} if reselect else masked)
        )
        W_dec = self.folded.W_dec._replace(bias=self.folded.b_dec)
        return ops.sae_encode(q, W_dec, activation="none", impl=self.impl)

    def _encoder(self) -> tuple[ops.PackedCodes, Tensor] | None:
        folded = self.folded
        return None if folded.W_enc is None else (folded.W_enc, folded.b_pre)

    def _select(self, x: Tensor, k: int, **options: Any) -> ops.Selection:
        encoder = self._encoder()
        if encoder is None:
            z = x.float() / self.rms
        else:
            z = ops.sae_encode(x, *encoder, activation=self.config.activation, impl=self.impl)
        return ops.codebook_quantize(z, self.folded.codes, k=k, impl=self.impl, **options)

    @torch.no_grad()
    def select(self, x: Tensor, k: int | None = None) -> ops.Selection:
        """The best codes of every token, nothing deleted. In evaluation mode only.

        Args:
            x: [..., D]; the leading dimensions are flattened to T tokens.
            k: codes per token, 1 <= k <= C; None = the config's.

        Returns:
            Selection(scores fp32 [T, k], ids int32 [T, k], None).
        """
        self._check_folded()
        return self._select(x.detach().reshape(-1, self.config.d_model), k or self.config.k)

    def active(self, x: Tensor, depth: int | None = None) -> Tensor:
        """The ids of :meth:`select`."""
        return self.select(x, depth).ids

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """What the kept codes decode to, whatever the splice: x [T, D] -> [T, D], as splice "replace" gives it."""
        return self._forward_inference(x.detach(), None, None)

    def receipt(self) -> dict[str, Any]:
        """What ran in evaluation since ``reset_receipt()``.

        Returns:
            impl: "reference", "cpu", "cuda" or "triton".
            scan: "int8", or "none": every code is scored.
            tokens: how many passed.
            hits: how many kept codes masks took away.

        Raises:
            ValueError, RuntimeError: ``impl`` is unknown, or cannot run.
        """
        self._settle()
        tokens, hits = self.passed.tolist()
        impl = ops.resolve(self.impl, self.codebook.codes.device)
        scans = impl != "reference" and self.folded is not None and self.folded.codes.scan is not None
        scan = "int8" if scans else "none"
        return {"impl": impl, "scan": scan, "tokens": tokens, "hits": hits}

    def constants(self) -> tuple[Any, ...]:
        """What a forward reads that is replaced, and not written to, when it changes."""
        return (self.folded,)

    # -- folding ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self) -> None:
        """Compute what evaluation reads: codes, and encoder and decoder multiplied by the scale, packed.

        Called by ``eval()``, after loading, after ``.to()``, and in eager mode by the next forward after a parameter
        was written to. Under ``torch.compile`` call it yourself after writing to a parameter in evaluation mode.
        """
        codes, sae, rms = self.codebook.codes.detach(), self.autoencoder, self.rms
        packed = self.codebook.pack(self.scan)
        if sae is None:
            table, autoencoder = codes.float() * rms, ()
        else:
            table = None
            W_enc = ops.pack_codes(sae.W_enc.detach().float() / rms, "dot", sae.b_enc.detach(), scan="none")
            b_pre, b_dec = sae.b_pre.float() * rms, sae.b_dec.float() * rms
            W_dec = ops.pack_codes(sae.W_dec.detach().float() * rms, "dot", scan="none")
            table_bytes = codes.shape[0] * self.config.d_model * codes.element_size()
            if table_bytes <= max(FOLD_LIMIT_BYTES, codes.numel() * codes.element_size()):
                table = ops.sae_encode(codes, W_dec, activation="none", impl=self.impl)
            autoencoder = W_enc, b_pre, W_dec, b_dec
        if table is not None and self.splice == "replace":  # what is added to x is rounded with it
            table = table.to(codes.dtype)
        self.folded = Folded(packed, table, *autoencoder)
        self._folded_version, self._folded_sample = self._version(), self._sample()

    def refresh(self) -> None:
        """Fold again, and forget the codebook's sha256, where a parameter was written to without torch counting it.

        ``.data``, a NumPy view and a fused optimizer write so. SAMPLE elements of each parameter are compared, so a
        write to a few elements may be missed. Called by ``eval()``, and before a mask is used.
        """
        if self._folded_sample is not None and not torch.equal(self._folded_sample, self._sample()):
            self._sha256 = None
            self.fold()

    def _weights(self) -> tuple[Tensor, ...]:
        # In every call: from the modules' own dictionaries, as an attribute takes ten times as long to find.
        try:
            sae, codes = self._modules.get("autoencoder"), self._modules["codebook"]._parameters["codes"]
            if sae is None:
                return codes, self._buffers["rms"]
            own = sae._parameters
            return codes, self._buffers["rms"], own["W_enc"], own["b_enc"], own["b_pre"], own["W_dec"], own["b_dec"]
        except KeyError:  # a parametrization computes it, or it is no parameter
            sae = self.autoencoder
            weights = () if sae is None else (sae.W_enc, sae.b_enc, sae.b_pre, sae.W_dec, sae.b_dec)
            return self.codebook.codes, self.rms, *weights

    def _version(self) -> list[tuple[int, int]]:
        weights = self._weights()
        try:
            return [(weight.data_ptr(), weight._version) for weight in weights]
        except RuntimeError:  # a tensor of inference mode counts none
            return [_tensor_version(weight) for weight in weights]

    def _sample(self) -> Tensor:
        """About SAMPLE elements of each parameter, evenly spread: the bits of fp32, int32 on the CPU."""
        parts = []
        for weight in self._weights():
            flat = weight.detach().reshape(-1)
            parts.append(flat[:: max(1, flat.numel() // SAMPLE)].float())
        return torch.cat(parts).cpu().view(torch.int32)

    def _check_folded(self) -> None:
        if torch.compiler.is_compiling():
            if self._folded_version is None:
                raise RuntimeError("the bottleneck is not folded; call model.eval() before torch.compile")
        elif self._folded_version != self._version():
            self.fold()

    def train(self, mode: bool = True) -> CodebookBottleneck:
        """Training mode drops what was folded, evaluation mode folds. Returns self."""
        super().train(mode)
        if mode:
            self._folded_version = self._folded_sample = self._sha256 = self.folded = None
        elif not self.codebook.codes.is_meta:
            self.refresh()
            self._check_folded()
        return self

    def _apply(self, fn, recurse=True):
        rms = self.rms
        super()._apply(fn, recurse)
        if not (rms.is_meta or self.rms.is_meta):
            self.rms = rms.to(self.rms.device)  # a scale, not a weight: casting the model must not round it
        self._folded_version = None  # a cast rounds what was folded, even where the parameters have that dtype already
        return self.train(self.training)

    def codebook_sha256(self) -> str:
        """The codebook's identity, which masks are bound to: sha256 of similarity, shape and codes, widened to fp32.

        A checkpoint read as fp32, or as the bf16 that it was stored in, is the same codebook. A codebook rounded to
        bf16 is another.
        """
        codes = self._weights()[0]
        version = _tensor_version(codes)
        # In training nothing is remembered: a fused optimizer writes to the codes without counting a version.
        if self.training or self._sha256 is None or self._sha256[0] != version:
            digest = hashlib.sha256(f"{self.config.similarity} {list(codes.shape)} ".encode())
            digest.update(codes.detach().float().cpu().contiguous().numpy().tobytes())
            self._sha256 = (version, digest.hexdigest())
        return self._sha256[1]

    @torch.no_grad()
    def erase(self, ids: Tensor) -> Tensor:
        """Remove codes for good, in place: their rows are dropped, and with them every trace of their values.

        The codes that remain are numbered anew: this is another codebook, to which old masks do not belong. The next
        best code takes the place of an erased one among the k, as mask_mode "reselect" does.

        Args:
            ids: int [n], the codes to remove.

        Returns:
            The old ids of the remaining codes, int64 [C - n], in their new order.

        Raises:
            ValueError: fewer than k codes would remain.
        """
        keep = torch.ones(self.config.num_codes, dtype=torch.bool)
        keep[ids.long().cpu()] = False
        kept = keep.nonzero()[:, 0]
        if len(kept) < self.config.k:
            raise ValueError(f"erasing {len(ids)} codes leaves {len(kept)}; k = {self.config.k} should remain")
        self.config = dataclasses.replace(self.config, num_codes=len(kept))
        book = self.codebook
        book.codes = nn.Parameter(book.codes.detach()[kept.to(book.codes.device)], book.codes.requires_grad)
        book.counts = book.counts[kept.to(book.counts.device)]
        self.train(self.training)
        return kept


def refuse_gradient(x: Tensor, y: Tensor) -> Tensor:
    """y, in evaluation computed of x: a backward pass through it raises RuntimeError."""
    return _NoGradient.apply(x, y)


class _NoGradient(torch.autograd.Function):
    """Evaluation has no gradient; asking for one is an error, not a zero."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "a codebook bottleneck in evaluation mode has no gradient; call model.train() to train through it"
        )


def _fold_loaded(bottleneck: CodebookBottleneck, _) -> None:
    bottleneck.train(bottleneck.training)


def _tensor_version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
