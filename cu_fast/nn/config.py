"""The settings of a bottleneck."""

from __future__ import annotations

import dataclasses
from typing import Any

from cu_fast.nn.splice import SPLICES, SpliceKind
from cu_fast.ops import ACTIVATIONS, MASK_MODES, SIMILARITIES, WEIGHTS, Activation, MaskMode, Similarity, Weight
from cu_fast.ops.checks import check_choice


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """The shape and the training terms of one bottleneck.

    Attributes:
        d_model: D, the layer's width.
        code_dim: E, the width of a code.
        num_codes: C.
        k: codes kept per token, 1 <= k <= num_codes.
        similarity: score of a code: "cosine", "dot" or "l2" (see ``cu_fast.ops.pack_codes``).
        activation: of the encoder: "relu" or "none".
        weight: of a kept code: "one" (CodeUnlearn), "mean" = 1 / k (Codebook Features), "score" = relu(score).
        autoencoder: False = no encoder and decoder; code_dim must be d_model (Codebook Features).
        normalize: divide x by its running root mean square, one number per layer, and multiply y by it. The scale
            is measured while training; without it codes hardly move where hidden states are large.
        mask_mode: "ablate" = a deleted code's weight is 0; "reselect" = the next best code takes its place (the
            paper's). Ablate is the default because the next best code often says the same.
        splice: "replace" = the layer's output becomes what the kept codes decode to; "delta" = it stays as it is, but for
            what deleted codes decode to, so that without a mask nothing changes.
        code_dropout: share of the codes that count for nothing in a training step, drawn anew in each, in [0, 1).
            The model learns to do without a code, so that deleting one topic's costs the others less.
        reconstruction_weight: factor of that term of ``auxiliary_loss()``, an error relative to the variance of x.
        commitment_weight: factor of the term that draws z to its codes.
        codebook_weight: factor of the term that draws codes to their z.
        l1_weight: factor of the mean absolute entry of the codes.
    """

    d_model: int
    code_dim: int
    num_codes: int
    k: int
    similarity: Similarity = "cosine"
    activation: Activation = "relu"
    weight: Weight = "one"
    autoencoder: bool = True
    normalize: bool = True
    mask_mode: MaskMode = "ablate"
    splice: SpliceKind = "replace"
    code_dropout: float = 0.0
    reconstruction_weight: float = 1.0
    commitment_weight: float = 0.25
    codebook_weight: float = 0.25
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("d_model", "code_dim", "num_codes", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it should be an int >= 1")
        if self.k > self.num_codes:
            raise ValueError(f"k is {self.k}; it should be at most num_codes, {self.num_codes}")
        if not self.autoencoder and self.code_dim != self.d_model:
            raise ValueError(
                f"code_dim is {self.code_dim}; without an autoencoder it should be d_model, {self.d_model}"
            )
        check_choice("similarity", self.similarity, SIMILARITIES)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("weight", self.weight, WEIGHTS)
        check_choice("mask_mode", self.mask_mode, MASK_MODES)
        check_choice("splice", self.splice, SPLICES)
        if self.splice == "delta" and self.mask_mode != "ablate":
            raise ValueError(f"mask_mode is {self.mask_mode!r}; with splice 'delta' it should be 'ablate'")
        if not 0 <= self.code_dropout < 1:
            raise ValueError(f"code_dropout is {self.code_dropout!r}; it should be in [0, 1)")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_weight") and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise ValueError(f"{field.name} is {value!r}; it should be a finite number >= 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, JSON values only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BottleneckConfig:
        """The config of which :meth:`to_dict` gave these values.

        Raises:
            ValueError: an unknown or missing key (a setting that is not understood is not ignored), or a wrong value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"the bottleneck's config has unknown keys {unknown} and lacks {missing}")
        return cls(**values)
