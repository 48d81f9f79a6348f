"""SIGINT and SIGTERM as a wish to stop: training saves first, and the command's status says why."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any


class InterruptedRunError(Exception):
    """A command that a signal ended early, once everything was saved and said.

    `status` is what a shell sees of a program that the signal killed: 130 after SIGINT, 143 after
    SIGTERM.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.status = 128 + signal.Signals[name]


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that the training loop reads between two steps.

    `name` is that of the signal, and empty before one came. It is answered at once in one line, as
    what is going on may take a while to end. A second signal acts as if nothing had been changed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere the program's own ones stay.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._put_back()
        # Not `print`: the handler may run while the main program is within a write of its own.
        said = f"\n{self.name}: stopping once a checkpoint is saved; again to stop at once\n"
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), said.encode())

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception: object) -> None:
        self._put_back()
