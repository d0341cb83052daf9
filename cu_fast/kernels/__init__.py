"""Everything that computes: plain PyTorch (reference), the native library (native), Triton. Chooses nothing."""
