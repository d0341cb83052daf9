"""Measures the decoder, with and without deleted codes. The same as `cu-fast bench masked_decode`, and takes the same options, for example:

python benchmarks/bench_masked_decode.py --tokens 64 --mask none,1%,rows --output rows.csv
"""

import sys

from cu_fast.cli.app import app

if __name__ == "__main__":
    app(["bench", "masked_decode", *sys.argv[1:]])
