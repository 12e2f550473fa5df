"""SIGINT and SIGTERM end a served command alike: by an exception, so that report and trace are written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from fairseq_moe_ext.serving.own_command import fairseqs_command


def on_interrupt(tell: Callable[[], None]) -> bool:
    """From here on both signals call `tell` and raise: KeyboardInterrupt, SystemExit with code 143.

    In fairseq's own commands alone, and only where the signals have Python's first handlers; whether it is one.
    """
    if fairseqs_command() is None or threading.current_thread() is not threading.main_thread():
        return False
    process = os.getpid()

    def interrupt(number: int, _frame) -> None:
        if os.getpid() == process:  # not a loader's process, which has this handler, too
            tell()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)
    return True
