"""What the engine's `submit` gives: one sentence on its way to its result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from torch import Tensor

from fairseq_moe_ext.decoding.requests import Request
from fairseq_moe_ext.serving.request_options import RequestOptions

Hypotheses = list[dict[str, Tensor]]  # of one sentence, as fairseq's generators give them, best first


class EngineRequest(Future):
    """`result(timeout)`, `exception(timeout)`, `done()`, `cancel()`, `add_done_callback(...)`, from any thread.

    `result` waits for whoever steps the engine; of a request that was cancelled it raises CancelledError.
    """

    def __init__(self, source: Request, max_len: int, options: RequestOptions, to_result: Callable[[Hypotheses], Any]):
        """source: a batch of this sentence alone. max_len: of its output, in tokens. to_result: what is given out."""
        super().__init__()
        self.source, self.max_len, self.options = source, max_len, options
        self.alone = False  # it shared a step that failed, and shares none any more
        self._to_result = to_result

    @property
    def tokens(self) -> Tensor:
        """The source's (S,) int64, as the encoder gets them."""
        return self.source.sample["net_input"]["src_tokens"][0]

    def finish(self, hypotheses: Hypotheses) -> None:
        """Give out the result; nothing where the request was cancelled meanwhile."""
        try:
            result = self._to_result(hypotheses)
        except Exception as error:
            self.fail(error)
        else:
            self._settle(lambda: self.set_result(result))

    def fail(self, error: Exception) -> None:
        """Give out `error` in place of a result; nothing where the request was cancelled meanwhile."""
        self._settle(lambda: self.set_exception(error))

    def drop(self) -> None:
        """Cancelled, and out of the engine: whoever waits for several requests hears of it."""
        self.cancel()
        self._settle(lambda: None)

    def _settle(self, settle: Callable[[], None]) -> None:
        try:
            settle()
        except InvalidStateError:
            pass
        if self.cancelled():
            self.set_running_or_notify_cancel()
