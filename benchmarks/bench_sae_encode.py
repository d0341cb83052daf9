"""Measures the encoder of a sparse autoencoder, dense and with selection.

The same as `cu-fast bench sae_encode,sae_encode_topk`, with other libraries where they are installed (rivals.py), and takes
the same options, for example:

python benchmarks/bench_sae_encode.py --tokens 1,64 --shape 4096,16384,64 --data outliers --output rows.csv
"""

import sys

import rivals

from cu_fast.cli.app import app

if __name__ == "__main__":
    rivals.register()
    app(["bench", "sae_encode,sae_encode_topk", *sys.argv[1:]])
