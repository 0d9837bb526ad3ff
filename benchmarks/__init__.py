"""Speed and memory, measured against what people use. Start with ``python -m benchmarks --help``.

Room card. Lives here: cases, peers, the clock, results. May import: anything. Nothing imports it.
"""
