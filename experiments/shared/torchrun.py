"""Start a module on several processes with torchrun, and read process 0's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by an outer torchrun


def on_processes(module: str, n: int, plan: Mapping[str, Any], timeout: float = 1800.0) -> Any:
    """Run ``python -m MODULE PLAN.json FOUND.json`` on n processes of one thread each.

    Args:
        module: its name.
        n: number of processes.
        plan: the plan that they read.
        timeout: seconds after which they count as hung.

    Returns:
        The results that process 0 wrote.

    Raises:
        ChildProcessError: if they hang or fail; the reason is on stderr.
    """
    with TemporaryDirectory(prefix="metamom-") as folder:
        said, found = Path(folder) / "plan.json", Path(folder) / "found.json"
        said.write_text(json.dumps(plan), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)),
            *("--standalone", "--local-addr", "127.0.0.1"),  # on a free port
            *("-m", module, str(said), str(found)),
        ]
        kept = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
        process = subprocess.Popen(command, env={**kept, "OMP_NUM_THREADS": "1"})
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ChildProcessError(f"{module}: {n} processes had not finished after {timeout:g} s.") from error
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun then ends its processes
                process.wait()
        if status:
            raise ChildProcessError(f"{module}: {n} processes ended with status {status}, see above.")
        return json.loads(found.read_text(encoding="utf-8"))
