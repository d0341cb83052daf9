"""Measures the selection of the k best codes. The same as `cu-fast bench codebook_quantize`, and takes the same options, for example:

python benchmarks/bench_codebook_quantize.py --tokens 1,64,512 --shape 512,25000,8 --dtype fp32 --output rows.csv
"""

import sys

from cu_fast.cli.app import app

if __name__ == "__main__":
    app(["bench", "codebook_quantize", *sys.argv[1:]])
