"""SIGTERM and SIGINT -> a wish to stop after this update; a second signal, a second later, ends the process at once."""

import os
import signal
import time

SAME = 1.0  # seconds in which a signal is the same wish: a scheduler tells every process, and torchrun tells its own
EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + number, as a shell reports it


class Interrupted(Exception):
    """Work that can be done again (an evaluation) was left because of a signal."""


class Interrupt:
    """A context in which the first signal is only noted, in `signal`. Outside of it signals do what they always do."""

    def __init__(self):
        self.signal = self.moment = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in EXIT}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal is not None:
            if time.monotonic() - self.moment > SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal, self.moment = signal.Signals(number), time.monotonic()
        words = f"\n{self.signal.name}: the state is saved after this update; a second signal stops at once.\n"
        os.write(2, words.encode())  # not print, which may have been interrupted itself

    def check(self) -> None:
        """Interrupted: a signal has come. For work between two updates."""
        if self.signal is not None:
            raise Interrupted(self.signal.name)
