"""torchrun with the run's exit status, and without tracebacks of its own below the run's last line.

    python -m run.launch --standalone --nproc_per_node 2 train.py --flags

Its options are torchrun's. A run that is asked to end has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds
for the step under way and its checkpoint: torchrun's 30 are few, here they are PATIENCE.
"""

import logging
import os
import sys

if __name__ == "__main__":  # a sign of life: torch takes seconds
    print("starting torchrun", flush=True)

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

PATIENCE = 900


def launch(argv: list[str]) -> int:
    """Run torchrun → the exit status: that of the first process that failed, 128 + n for signal n."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    logging.disable(logging.ERROR)  # which tells each signal that it sends
    try:
        main(argv)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode >= 0:  # it has told why
            return first.exitcode
        print(f"rank {rank} was killed by signal {-first.exitcode}", file=sys.stderr)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
