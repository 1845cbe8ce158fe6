"""A server process for tests of its signals. Prints its port; each line it reads allows a step.

The first argument says whether completions are endless, which are made without being allowed.
"""

from __future__ import annotations

import asyncio
import sys
import threading

from lowbit.server.config import ServerConfig
from lowbit.server.rpc.deployment import Loaded
from lowbit.server.rpc.server import GenerationServer, serve
from serving import RecitingRunner, make_rig


def main(endless: bool) -> None:
    runner = RecitingRunner(endless=endless, step_seconds=0.005 * endless, gated=not endless)
    rig = make_rig(runner, config=ServerConfig(port=0, metrics_port=0))

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
    main(sys.argv[1] == "endless")
