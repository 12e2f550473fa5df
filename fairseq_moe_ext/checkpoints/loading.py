"""What loading a checkpoint takes: bytes, seconds, a progress bar; and the model's state on its way into the model."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from tqdm import tqdm

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.open_files import OpenFiles
from fairseq_moe_ext.checkpoints.quantized_about import QuantizedAbout

EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
BAR_DELAY = 3.0  # seconds before a bar appears


class Loading:
    """Bytes of tensors that were read from one checkpoint's files, and the seconds that this took.

    files: those that are open. error: what was found wrong with a file. It is kept since torch's load_state_dict turns
    any error into its own.
    """

    def __init__(self, path: str):
        self.path = path
        self.files = OpenFiles()
        self.bytes = 0
        self.seconds = 0.0
        self.error: CheckpointError | None = None
        self._bar: tqdm | None = None
        self._lock = threading.Lock()

    def count(self, number: int) -> None:
        """Add `number` bytes, also from another thread."""
        with self._lock:  # also threads that fill buffers read
            self.bytes += number
            if self._bar is not None:
                self._bar.update(number)

    @contextmanager
    def timed(self, total: int | None = None) -> Iterator[None]:
        """The seconds in this context are loading's; with `total` bytes to come, it shows how far they are."""
        start = time.perf_counter()
        if total is not None:
            self._bar = tqdm(
                total=total, desc=f"loading {self.path}", unit="B", unit_scale=True, delay=BAR_DELAY, leave=False
            )
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def __deepcopy__(self, memo: dict) -> Loading:
        return self  # a copied model was loaded by the same loading

    def as_dict(self) -> dict[str, float]:
        """`loading` of the report."""
        gigabytes = self.bytes / 1e9
        return {
            "seconds": self.seconds,
            "bytes": self.bytes,
            "seconds_per_gb": self.seconds / gigabytes if gigabytes else 0.0,
        }


class ModelState(OrderedDict):
    """A checkpoint's model state, key -> tensor, that knows what loading it takes.

    had_optimizer: whether the files hold an optimizer state, which was left where it is. about: what a quantised
    checkpoint says of itself; None: it is none. advise: (entries wanted, entries given, symbols) -> what makes such a
    dictionary fit, "" where nothing is known to. kept: of a pruned model's checkpoint; None: it is whole.
    """

    advise: Callable[[int, int, Sequence[str]], str] | None = None

    def __init__(
        self, tensors, loading: Loading, had_optimizer: bool = False, about: QuantizedAbout | None = None
    ):
        super().__init__(tensors)
        self.loading = loading
        self.had_optimizer = had_optimizer
        self.about = about
        self.kept: KeptExperts | None = None


@contextmanager
def loading_into(model: nn.Module, state: dict[str, Tensor]) -> Iterator[Loading | None]:
    """Around `model.load_state_dict(state)`; gives the state's Loading, None where it is no ModelState (training).

    CheckpointError where a file turns out damaged, or where the state does not fit the model.
    """
    if not isinstance(state, ModelState):
        yield None
        return
    loading = state.loading
    loading.error = None  # of an earlier try
    check_vocabulary(model, state)
    try:
        with loading.timed(total=sum(tensor.nbytes for tensor in state.values())):
            yield loading
    except Exception as error:
        # fairseq's own complaints of old versions are of no narrower type
        if not isinstance(error, RuntimeError) and type(error) is not Exception:
            raise
        if loading.error is not None:
            raise loading.error from None
        complaints = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise CheckpointError(
            f"{loading.path}: its tensors must fit the model that its configuration describes: {complaints[0][:600]}"
        ) from error


def check_vocabulary(model: nn.Module, state: ModelState) -> None:
    """The commonest misfit, said in its own words."""
    for name, parameter in model.named_parameters():
        if name in EMBEDDINGS and name in state and parameter.dim() == 2 and state[name].dim() == 2:
            wanted, given = state[name].size(0), parameter.size(0)
            if wanted != given:
                off = f"{abs(wanted - given)} too {'few' if given < wanted else 'many'}"
                raise CheckpointError(
                    f"{state.loading.path}: the dictionary must have as many entries as the checkpoint's {name} has "
                    f"rows, {wanted}, got {given}, {off}: {_advice(model, state, wanted, given)}the data's dict.*.txt "
                    "and the language flags must be those of the training"
                )


def _advice(model: nn.Module, state: ModelState, wanted: int, given: int) -> str:
    symbols = getattr(getattr(getattr(model, "encoder", None), "dictionary", None), "symbols", ())
    advice = state.advise(wanted, given, symbols) if state.advise is not None else ""
    return f"{advice}; otherwise " if advice else ""
