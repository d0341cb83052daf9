"""Measures a whole bottleneck. The same as `cu-fast bench bottleneck`, and takes the same options, for example:

python benchmarks/bench_bottleneck.py --tokens 1,64 --shape 512,25000,8 --output rows.csv
"""

import sys

from cu_fast.cli.app import app

if __name__ == "__main__":
    app(["bench", "bottleneck", *sys.argv[1:]])
