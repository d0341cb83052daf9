"""The settings of a bottleneck."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """The shape and the training terms of one bottleneck.

    d_model: D, the layer's width. code_dim: E. num_codes: C. k: codes kept a token.
    similarity: "cosine", "dot" or "l2". activation: of the encoder, "relu" or "none".
    weight: a kept code's weight: "one" (CodeUnlearn), "mean" (1/k, Codebook Features), "score" (relu(score)).
    autoencoder: False = no encoder and decoder, code_dim must be d_model (Codebook Features).
    normalize: divide x by its running root mean square (one number for the layer), and multiply y by it. The
        scale is learnt while training; without it codes hardly move where hidden states are large.
    mask_mode: what a mask does: "ablate" zeroes a deleted code's weight, "reselect" lets the next best take its
        place (the paper's). Ablate is the default because the next best code often says the same.
    code_dropout: while training, the share of codes that count for nothing, drawn anew at every step: the model
        learns to do without a code, so that deleting one topic's costs the others less.
    *_weight: factors of the terms of ``auxiliary_loss()``; reconstruction is relative to the variance of x.
    """

    d_model: int
    code_dim: int
    num_codes: int
    k: int
    similarity: Literal["cosine", "dot", "l2"] = "cosine"
    activation: Literal["relu", "none"] = "relu"
    weight: Literal["one", "mean", "score"] = "one"
    autoencoder: bool = True
    normalize: bool = True
    mask_mode: Literal["ablate", "reselect"] = "ablate"
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
        for name, allowed in (
            ("similarity", ("cosine", "dot", "l2")),
            ("activation", ("relu", "none")),
            ("weight", ("one", "mean", "score")),
            ("mask_mode", ("ablate", "reselect")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(allowed)}")
        if not 0 <= self.code_dropout < 1:
            raise ValueError(f"code_dropout is {self.code_dropout!r}; it should be in [0, 1)")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_weight") and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise ValueError(f"{field.name} is {value!r}; it should be a finite number >= 0")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BottleneckConfig:
        """Raises ValueError for an unknown or missing key: a setting that is not understood is not ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(f"the bottleneck's config has unknown keys {unknown} and lacks {missing}")
        return cls(**values)
