"""`python benchmarks/flows.py`: what orchestration costs: the flow `retrain` against `dvc repro`, on this project.

Runs both, in turn, in a copy with the `smoke` preset, with a changed setting each time so that every stage from
`pretrain` on runs, and a server beside them. The flow's gate is not part of `dvc repro`; it is measured for itself.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rounds import seconds

from barlow.core import provenance

ROOT = Path(__file__).parent.parent
ROUNDS = 3
PORT = 4299
API = f"http://127.0.0.1:{PORT}/api"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from clones import clone, commit, run

    print(provenance.hardware())
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PREFECT_HOME": f"{folder}/home", "PREFECT_API_URL": API, "DVC_NO_ANALYTICS": "1"}
        project = clone(Path(folder) / "barlow")
        run(project, "barlow", "scan")
        run(project, "dvc", "repro")
        number = 0

        def change() -> None:
            nonlocal number
            number += 1
            path = project / "params.yaml"
            text = path.read_text().splitlines()
            text = [f"  weight_decay: {number}.0e-6" if line.startswith("  weight_decay:") else line for line in text]
            path.write_text("\n".join(text) + "\n")
            commit(project)

        server = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(PORT), "--log-level", "ERROR"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        load = "from flows.retrain import retrain"
        flow = f"{load}; import sys; sys.exit(not retrain(return_state=True).is_completed())"
        with subprocess.Popen(server, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL) as running:
            try:
                while not healthy():
                    time.sleep(0.5)
                pairs, gates, starts = [], [], []
                for _ in range(ROUNDS):
                    change()
                    plain = seconds(lambda: run(project, "dvc", "repro"))
                    gates.append(seconds(lambda: run(project, "barlow", "promote")))
                    change()
                    pairs.append((seconds(lambda: run(project, sys.executable, "-c", flow)), plain))
                    starts.append(seconds(lambda: run(project, sys.executable, "-c", load)))
            finally:
                running.terminate()
    flows, plains = zip(*pairs, strict=True)
    gate, start = statistics.median(gates), statistics.median(starts)
    costs = [flow - plain for flow, plain in pairs]
    print(
        f"retrain {statistics.median(flows):.1f} s, dvc repro {statistics.median(plains):.1f} s; difference "
        f"{statistics.median(costs):.1f} s ({min(costs):.1f} to {max(costs):.1f}, n={ROUNDS}), gate {gate:.1f} s, "
        f"import of Prefect {start:.1f} s"
    )


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{API}/health") as answer:
            return bool(json.load(answer))
    except OSError:
        return False


if __name__ == "__main__":
    main()
