"""Compares the speed of tp-runtime with that of other runtimes, on the same weights, interleaved in one run.

protocol.py                the messages between the driver and a worker process: one line of JSON in each direction
ours.py ... llama_cpp.py   one worker for each runtime
bandwidth.py               a worker that reads memory as fast as it can
rivals.py                  which worker runs which files, and why a runtime is left out
pool.py                    starts the workers, and stops all but the one that is measured
rounds.py                  the commands of a round, their order, and the medians
weights.py                 the bytes of weights that a token reads
batch.py                   batches of different patches
machine.py                 the description of the machine
prepare.py                 the files that are measured
__main__.py                `python -m benchmarks.speed`, which runs everything and writes one JSON file
tables.py, plots.py        BENCHMARKS.md and its plots, from that file
"""
