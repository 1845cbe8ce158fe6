"""`lowbit serve` with a model that cannot bear prompts that begin with token 7.

The arguments: a checkpoint, and what such a prompt does to a step: raise or hang.
"""

from __future__ import annotations

import sys
import time

from lowbit.server import cli
from lowbit.server.engine.model_runner import LaunchedStep, ModelRunner
from lowbit.server.engine.scheduler import SchedulerOutput

STEP_TIMEOUT_SECONDS = 3


def main(checkpoint: str, how: str) -> int:
    launch = ModelRunner.launch

    def broken(self: ModelRunner, output: SchedulerOutput, previous: object) -> LaunchedStep:
        if any(sequence.token_ids[0] == 7 for sequence in output.sequences):
            if how == "hang":
                time.sleep(20 * STEP_TIMEOUT_SECONDS)
            raise RuntimeError("no such luck")
        return launch(self, output)

    ModelRunner.launch = broken
    ports = ["--port", "0", "--metrics-port", "0"]
    timeout = ["--step-timeout-seconds", str(STEP_TIMEOUT_SECONDS)]
    return cli.main(["serve", checkpoint, *ports, *timeout])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
