"""Everything that computes: plain PyTorch (reference), the native library (native), Triton. Knows no policy."""
