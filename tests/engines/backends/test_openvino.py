"""What OpenVINO itself leaves behind in the process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENDS_IN_ANY_ORDER = """
import gc, signal, threading
from engines.backends.openvino import OpenVinoEngine, best_precision
from engines.build import build_graph
from engines.networks.registry import load_classifier

best_precision()
graph = build_graph(load_classifier("compact", "random", 32))
engines = [OpenVinoEngine(graph, "fp32") for _ in range(3)]
thread = threading.Thread(target=engines.append, args=(OpenVinoEngine(graph, "fp32"),))
thread.start()
thread.join()
for _ in range(len(engines)):
    engines.pop(0).close()
    gc.collect()
try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_safe_after_engines_that_ended_in_another_order_than_they_began():
    """In a process of its own: where it fails, the process is gone."""
    found = subprocess.run(
        [sys.executable, "-c", ENDS_IN_ANY_ORDER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "interrupted\n"), found.stderr
