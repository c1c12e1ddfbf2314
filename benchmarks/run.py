"""Measures this machine, and writes `benchmarks/results.json`.

Every row but the plain rates is a ratio of two things measured in this run, which can be compared between machines.
Images are random, of MNIST's shape; the network is the paper's.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.computation import measure_computation
from benchmarks.convolution import measure_convolution
from benchmarks.ddpm import measure_ddpm
from benchmarks.forward import measure_forward
from benchmarks.gpu import measure_gpu
from benchmarks.packing import measure_packing
from benchmarks.setup import Row, printed
from pipeline.local_services import LocalServices

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Runs all benchmarks; returns the exit status."""
    if sys.argv[1:]:
        print(__doc__ or "")
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    rows: list[Row] = []

    def add(name: str, value: float | None, unit: str, goal: str, note: str) -> None:
        rows.append(Row(name, value, unit, goal, note))
        print(printed(name, value, unit, goal, note), flush=True)

    print(f"{'name':<46} {'value':>12} {'unit':<10} {'goal':<8} note")
    with tempfile.TemporaryDirectory(prefix="infusion-bench-") as name:
        folder = Path(name)
        # What runs bare is measured before the services start, which take a tenth of two cores even when idle.
        train_rate = measure_computation(folder, add)
        measure_forward(add)
        measure_convolution(add)
        measure_packing(add)
        measure_ddpm(add)
        measure_gpu(folder, add)
        services = LocalServices(folder, ports="free")
        try:
            services.up()
            os.environ.update(services.env())
            # Ray reads its variables once, when it is imported.
            from benchmarks.machinery import measure_machinery

            measure_machinery(folder, train_rate, add)
        finally:
            services.down(delete_data=True)
    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
