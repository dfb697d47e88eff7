"""What `tools/bench.py` measures: every figure beside a baseline that runs here too."""
