"""Who is in the buffer, who leaves it, and in which order a batch's experts are computed. Plain Python over ids.

A layer's call is one batch; the experts that have tokens in it are active, all known before the first is computed. One
that is resident when its turn comes is a hit, any other a miss, which enters the buffer, and where that is full another
expert is evicted for it. Two orders of computation:

`ascending`, the paper's: one after another in rising id. An expert that is resident when the batch begins may be
evicted by a miss with a smaller id before its turn comes, and is then a miss itself: who leaves decides this batch's
misses. With more active experts than places the ids come round like a clock, where the expert needed last is the one
that ran last, which is why LIFO is right there and FIFO and LRU lose nearly everything.

`resident-first`: the active experts that are resident, in rising id, then the others, in rising id. A batch misses
exactly the active experts that were not resident when it began, whatever the policy; who leaves decides the misses of
later batches only. No order misses fewer in this batch. The turns of the misses are for the policy alone: a served
layer reads and computes them in another order (call.py).

Every policy lets experts go first that are idle in this batch, since the batch is known; policies differ in whom they
choose among the idle, and among the active where none is idle:

    lifo  the last that came in (paper)
    fifo  the first that came in
    lru   the least recently computed
    lfu   the least often computed, old batches counting less (see `AGEING`); equals: the least important by a ranking,
          where there is one, else the least recently computed

Source: "Toward Efficient Inference for Mixture of Experts", section on expert buffering, for `ascending` and `lifo`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

ORDERS = ("resident-first", "ascending")
IN_TURN = ("ascending",)  # of which a served layer computes experts in just the order of their turns
# The pair with the fewest misses over all sizes of the models that docs/buffering.md names.
DEFAULT_POLICY = "lfu"
DEFAULT_ORDER = "resident-first"
# What a use counts for `lfu` falls by this factor with every batch, so that a new domain's experts find a place.
AGEING = 0.95
_NEVER = -1
_HEAVY = 1e200  # weights begin anew from here on


@dataclass
class History:
    """What a policy may know; turns count accesses.

    entered: of the resident experts, the turn in which each came in, in that order. used: the turn of an expert's last
    use. uses: how often it was used, old batches counting less. places: of experts in a ranking, the first is 0.
    """

    entered: dict[int, int]
    used: dict[int, int] = field(default_factory=dict)
    uses: dict[int, float] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)

    def unused(self, expert: int) -> tuple:
        """How long it was not used; of experts that never were, the one that came in last has the least claim."""
        return -self.used.get(expert, _NEVER), self.entered[expert]


# name -> what a resident expert is compared by: of those that are idle, the one with the largest is evicted. A new
# policy is one more line here: flags, simulation and plots read their names off it
POLICIES: dict[str, Callable[[History, int], tuple]] = {
    "lifo": lambda history, expert: (history.entered[expert],),
    "fifo": lambda history, expert: (-history.entered[expert],),
    "lru": lambda history, expert: history.unused(expert),
    "lfu": lambda history, expert: (
        -history.uses.get(expert, 0.0), history.places.get(expert, 0), *history.unused(expert)
    ),
}


@dataclass(frozen=True)
class Access:
    """One active expert's turn. evicted: who left for it; None for a hit, and while places are free."""

    expert: int
    hit: bool
    evicted: int | None = None


class Buffer:
    """The ids in a buffer of `size` places, through one batch after another; the weights are someone else's.

    initial: who is resident at the start, in the order they came in; at most `size` ids, each once. ranking: ids,
    the most important first, by which a policy may choose among equals.

    >>> buffer = Buffer(2, "lifo", "ascending", initial=[0, 1])
    >>> buffer.run([0, 2])
    [Access(expert=0, hit=True, evicted=None), Access(expert=2, hit=False, evicted=1)]
    >>> buffer.resident
    (0, 2)
    """

    def __init__(self, size: int, policy: str, order: str, initial: Sequence[int] = (), ranking: Sequence[int] = ()):
        if size < 1:
            raise ValueError(f"the buffer's size must be at least 1, got {size}")
        for name, value, known in (("policy", policy, POLICIES), ("order", order, ORDERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if len(set(initial)) != len(initial) or len(initial) > size:
            raise ValueError(f"initial must be at most {size} different experts, got {list(initial)}")
        self.size = size
        self._worth_evicting = POLICIES[policy]
        self._ascending = order == "ascending"
        self._turn = 0  # counts accesses
        self._weight = 1.0  # of a use in the batch: it grows in place of all older ones' growing less
        self._history = History({expert: number - len(initial) for number, expert in enumerate(initial)})
        self._history.places = {expert: place for place, expert in enumerate(ranking)}

    @property
    def resident(self) -> tuple[int, ...]:
        """In the order they came in."""
        return tuple(self._history.entered)

    def run(self, active: Iterable[int]) -> list[Access]:
        """Take the experts that are active in the next batch, in any order; their turns, in the order to compute."""
        active, history = sorted(active), self._history
        self._weight /= AGEING
        if self._weight > _HEAVY:
            history.uses = {expert: uses / self._weight for expert, uses in history.uses.items()}
            self._weight = 1.0
        if all(map(history.entered.__contains__, active)):  # as nearly always where the working set fits
            return [self._hit(expert) for expert in active]
        if not self._ascending:
            active.sort(key=lambda expert: expert not in history.entered)
        in_batch = set(active)
        return [self._access(expert, in_batch) for expert in active]

    def _hit(self, expert: int) -> Access:
        self._turn += 1
        self._history.used[expert] = self._turn
        self._history.uses[expert] = self._history.uses.get(expert, 0.0) + self._weight
        return Access(expert, True)

    def _access(self, expert: int, in_batch: set[int]) -> Access:
        history, evicted = self._history, None
        if expert in history.entered:
            return self._hit(expert)
        if len(history.entered) == self.size:
            evicted = max(
                history.entered,
                key=lambda resident: (resident not in in_batch, *self._worth_evicting(history, resident)),
            )
            del history.entered[evicted]
        history.entered[expert] = self._turn + 1
        self._hit(expert)
        return Access(expert, False, evicted)


def minimum_misses(batches: Sequence[Sequence[int]], size: int, order: str, initial: Sequence[int] = ()) -> int:
    """Belady's MIN: the fewest misses of a buffer that knows every batch to come; `batches` are active experts.

    ascending: of that order, by evicting the expert whose next turn is farthest. resident-first: the fewest of any
    order and any policy, even one that lets an expert leave as soon as it is computed: a batch costs the active
    experts that are not resident, and after it those of `resident or active` stay that are needed soonest.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if order == "ascending":  # one expert after another, and a miss must enter
        turns = [[expert] for batch in batches for expert in sorted(batch)]
    else:
        turns = [sorted(batch) for batch in batches]
    return sum(_misses_by_foresight(turns, size, set(initial), must_enter=order == "ascending"))


def _misses_by_foresight(turns: list[list[int]], size: int, resident: set[int], must_enter: bool) -> Iterable[int]:
    never = len(turns)
    upcoming: dict[int, list[int]] = {}  # expert -> the turns that want it, the next one last
    for number in range(len(turns) - 1, -1, -1):
        for expert in turns[number]:
            upcoming.setdefault(expert, []).append(number)

    def next_turn(expert: int) -> tuple[int, int]:
        return (upcoming[expert][-1] if upcoming.get(expert) else never), expert

    for turn in turns:
        for expert in turn:
            upcoming[expert].pop()
        missing = set(turn) - resident
        yield len(missing)
        if must_enter and missing:
            resident = set(sorted(resident, key=next_turn)[: size - len(missing)]) | missing
        else:
            resident = set(sorted(resident | missing, key=next_turn)[:size])
