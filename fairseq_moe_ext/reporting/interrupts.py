"""SIGINT and SIGTERM end a served command alike: by an exception, so that report and trace are written."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable

from fairseq_moe_ext.ranks.faults import interruption
from fairseq_moe_ext.reporting.own_command import fairseqs_command


def on_interrupt(tell: Callable[[int], bool], finish: Callable[[], None]) -> bool:
    """From here on both signals call `tell` with their number and, where it is True, raise: KeyboardInterrupt, or
    SystemExit with code 143. `finish` is called when the process ends.

    In fairseq's own commands alone, and only where the signals have Python's first handlers; whether it is one. A
    process that has come to its end by itself goes on to it: torchrun sends its signals then, too.
    """
    if fairseqs_command() is None or threading.current_thread() is not threading.main_thread():
        return False
    process, ending = os.getpid(), []
    atexit.register(finish)
    atexit.register(ending.append, True)  # comes before it

    def interrupt(number: int, _frame) -> None:
        if ending or not threading.main_thread().is_alive():
            return
        # a loader's process has this handler, too
        if os.getpid() != process or tell(number):
            raise interruption(number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    return True
