"""What steering costs: `python -m benchmarks.overhead`; method and results are in the README beside this file."""
