"""For all tests: signals as a terminal would deliver them."""

import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that
# they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
