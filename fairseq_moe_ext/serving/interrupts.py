"""SIGINT and SIGTERM end a served command alike: by an exception, so that report and trace are written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from fairseq_moe_ext.gating.rank_faults import interruption
from fairseq_moe_ext.serving.own_command import fairseqs_command


def on_interrupt(tell: Callable[[int], bool]) -> bool:
    """From here on both signals call `tell` with their number and, where it is True, raise: KeyboardInterrupt, or
    SystemExit with code 143.

    In fairseq's own commands alone, and only where the signals have Python's first handlers; whether it is one.
    """
    if fairseqs_command() is None or threading.current_thread() is not threading.main_thread():
        return False
    process = os.getpid()

    def interrupt(number: int, _frame) -> None:
        # a loader's process has this handler, too
        if os.getpid() != process or tell(number):
            raise interruption(number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    return True
