"""Fuzzing: mutated files of every format through convert, verify, the reader and the loaders.

`python -m tests.fuzz.run --inputs 20000 --seed 0 --json FILE` makes the run; `mutate*.py` change
valid files (`seeds.py`), `targets.py` and `pipelines.py` feed them to our code, `sandbox.py`
watches what that does, `coverage_guided.py` lets atheris search the parsers in pure Python.
"""
