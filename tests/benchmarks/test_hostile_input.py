"""A small case of the benchmark, and one that is refused."""

import os
from functools import partial

from benchmarks.hostile_input import CASES, measure, small_files


def test_small_cases():
    case = CASES["files"]._replace(write=partial(small_files, count=30))
    status, peak_mb, _, last_line = measure(case)
    assert status == 0 and "wrote DIR/out" in last_line and peak_mb > 50
    case = CASES["files"]._replace(write=lambda folder: os.mkfifo(folder / "a.txt"))
    status, _, _, last_line = measure(case)
    assert status == 2 and last_line.startswith("error: --input: DIR/in/a.txt is a FIFO")
