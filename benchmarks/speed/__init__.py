"""The speed of tp-runtime beside that of other runtimes, on the same weights, interleaved in one run.

protocol.py                what a worker process says and hears: one line of JSON each way
ours.py ... llama_cpp.py   one worker for each runtime; bandwidth.py: one that reads memory as fast as it can
rivals.py                  which worker runs which files, and why one is left out
pool.py                    starts workers, stops all but the one that is measured
rounds.py                  what is asked, in which order, and the medians
weights.py                 bytes of weights that a token reads
batch.py                   batches of different patches
machine.py                 what it ran on
prepare.py                 the files that are measured
__main__.py                `python -m benchmarks.speed`: everything, into one JSON file
tables.py, plots.py        BENCHMARKS.md and its plots, from that file
"""
