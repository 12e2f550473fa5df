"""The plugin's own errors in fairseq's commands: one sentence, the last that is said, once under several ranks.

Every `raise` of this package is meant for a user and is one sentence (a bad flag, a broken checkpoint). What other code
raises, also on this package's behalf, keeps its traceback, as does everything under `--moe-debug`.
"""

from __future__ import annotations

import atexit
import dis
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from fairseq_moe_ext.atomic_file import write_json
from fairseq_moe_ext.reporting.own_command import fairseqs_command, program

DEBUG = "--moe-debug"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's name for the file in which a rank says why it fails
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_own(error: BaseException) -> bool:
    """Whether a `raise` statement of this package made the error; not what a library raises in a call from here."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not isinstance(error, Exception) or isinstance(error, AssertionError):
        return False
    code = traceback.tb_frame.f_code
    return os.path.realpath(code.co_filename).startswith(_PACKAGE) and code.co_code[traceback.tb_lasti] == _RAISE


def tell_in_a_sentence() -> None:
    """From here on `sys.excepthook` tells this package's own errors in a sentence; for fairseq's commands alone."""
    if fairseqs_command() is None or DEBUG in sys.argv or getattr(sys.excepthook, "moe_ext_hook", None) is not None:
        return
    hook, pending = sys.excepthook, []
    atexit.register(lambda: _say(*pending))  # after all that is registered later: a report's line in the log

    def tell(kind: type, error: BaseException, traceback: TracebackType | None) -> None:
        if not is_own(error):
            hook(kind, error, traceback)
        elif "RANK" in os.environ:
            _say_of_rank(str(error))
        else:
            pending.append(str(error))

    tell.moe_ext_hook = hook
    sys.excepthook = tell


def _say(*sentences: str) -> None:
    for sentence in sentences:
        print(f"{program()}: error: {sentence}", file=sys.stderr, flush=True)


def _say_of_rank(sentence: str) -> None:
    """To torchrun, which says it when the ranks have ended; a rank that something else started says it itself."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        _say(sentence)
        return
    write_json(file, {"message": f"{program()}: error: {sentence}", "timestamp": str(int(time.time()))})
