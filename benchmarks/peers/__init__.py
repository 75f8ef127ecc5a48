"""actsteer beside its peers: `python -m benchmarks.peers`; method and results are in the README above."""
