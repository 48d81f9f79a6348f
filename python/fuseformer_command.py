"""The command `fuseformer`, before PyTorch is loaded."""

import os
import sys


def main() -> int:
    """Run the command line; return the exit status.

    Threads that wait for each other spin by default. Where another process wants the same
    processors, they spin away the time in which the others could work, and training all but stops.
    OpenMP reads its policy when PyTorch loads it, hence here.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fuseformer.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
