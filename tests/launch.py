"""Start a script on several gloo ranks of this machine, as a launcher would, and wait for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def launch(script: Path, *arguments: object, ranks: int, seconds: float = 300.0) -> list[str]:
    """Run `python script arguments...` on `ranks` ranks and return what each printed.

    Each rank gets one CPU thread. AssertionError with the ranks' output if one fails or is not done after `seconds`; the
    others are then stopped, since they may wait for it for ever.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    processes = []
    for rank in range(ranks):
        environment = os.environ | {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, str(script), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                time.sleep(0.5)  # let the others print why they stop, too
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    report = "\n".join(
        f"--- rank {rank}, exit {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
    )
    assert not any(codes), f"{script.name} failed on {ranks} ranks\n{report}"
    return outputs
