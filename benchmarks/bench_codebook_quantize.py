"""Measures the selection of the k best codes.

The same as `cu-fast bench codebook_quantize`, with other libraries where they are installed (rivals.py), and takes
the same options, for example:

python benchmarks/bench_codebook_quantize.py --tokens 1,64,512 --shape 512,25000,8 --dtype fp32 --output rows.csv
"""

import sys

import rivals

from cu_fast.cli.app import app

if __name__ == "__main__":
    rivals.register()
    app(["bench", "codebook_quantize", *sys.argv[1:]])
