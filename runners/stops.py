"""What signals ask of a runner: SIGTERM is checkpoint and exit 75, SIGUSR1 checkpoint and go on."""

import signal
from types import FrameType

from tuneyard.runners.failures import Stopped


class Stops:
    """What was asked so far.

    At first there is nothing to keep, and SIGTERM ends the runner where it stands; after ``defer``
    the loop looks at ``stop_asked`` when it can keep its state, and whoever publishes ignores it:
    a result that is nearly there is worth more than a stop.
    """

    def __init__(self) -> None:
        self.stop_asked = False
        self._checkpoint_asked = False
        self._deferred = False

    def listen(self) -> None:
        """Take over the signals; called before anything slow."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_checkpoint)

    def defer(self) -> None:
        """Leave the answer to the work, from now on."""
        self._deferred = True

    def take_checkpoint_asked(self) -> bool:
        """Whether a checkpoint was asked for since the last time."""
        asked, self._checkpoint_asked = self._checkpoint_asked, False
        return asked

    def _on_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stop_asked = True
        if not self._deferred:
            raise Stopped(at_checkpoint=False)

    def _on_checkpoint(self, _signal: int, _frame: FrameType | None) -> None:
        self._checkpoint_asked = True
