"""A server process for tests of its signals. Prints its port; each line it reads allows a step.

The first argument: "gated"; "endless" completions, which are made without being allowed; or
"pausing" for a second, or "pausing for long", after the first signal, and gated.
"""

from __future__ import annotations

import asyncio
import sys
import threading

from lowbit.server.config import ServerConfig
from lowbit.server.rpc.deployment import Loaded
from lowbit.server.rpc.server import GenerationServer, serve
from serving import RecitingRunner, make_rig


def main(kind: str) -> None:
    endless = kind == "endless"
    runner = RecitingRunner(endless=endless, step_seconds=0.005 * endless, gated=not endless)
    pause = {"pausing": 1.0, "pausing for long": 60.0}.get(kind, 0.0)
    config = ServerConfig(port=0, metrics_port=0, drain_pause_seconds=pause)
    rig = make_rig(runner, config=config)

    def read_lines() -> None:
        for _ in sys.stdin:
            runner.allow(1)

    def report(server: GenerationServer) -> None:
        print(server.port, flush=True)

    threading.Thread(target=read_lines, daemon=True).start()

    async def load() -> Loaded:
        return rig.loaded

    asyncio.run(serve(rig.config, rig.metrics, load, warm_up=False, on_started=report))


if __name__ == "__main__":
    main(sys.argv[1])
