"""What the stages share.

Importing it lets Ctrl-C end the process at once and without a traceback, also while libraries are
imported; from stage.run() on it says how to resume.
"""

import signal

# Not where it is ignored, as in the background.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
