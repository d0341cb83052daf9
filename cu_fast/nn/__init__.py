"""Modules: SparseAutoencoder, Codebook, and the CodebookBottleneck that CodeUnlearn puts into a model."""

from cu_fast.nn.autoencoder import SparseAutoencoder
from cu_fast.nn.bottleneck import CodebookBottleneck
from cu_fast.nn.codebook import Codebook
from cu_fast.nn.config import BottleneckConfig
from cu_fast.nn.splice import SPLICES, Splice, SpliceKind

__all__ = ["SPLICES", "BottleneckConfig", "Codebook", "CodebookBottleneck", "SparseAutoencoder", "Splice", "SpliceKind"]
