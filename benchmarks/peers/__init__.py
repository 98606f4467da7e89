"""The systems that benchmarks compare: one adapter a file, all with the same functions.

An adapter runs in an interpreter that has its system (ours in the project's, the others in the
peers' environment) as `python -m peers.NAME`, reads a job as JSON and prints its results as JSON.
It never judges: it reports which samples came in which batch, and `scoring.py` counts.

What an adapter has:

- `SETTINGS`: what was set, in words, and `versions()`.
- `VARIANTS`: the ways of use that are measured, the first one in every measurement.
- `pack(source, out, variant)`: the samples of our shards in the system's own format.
- `deliver(request)`: the batches of one rank, in that rank's process.
- `SHARDS`, `header`, `break_index`, `read`: for the damage table; see `damage.py`.
- `scale(job)`: what can be measured on an index without data.
"""
