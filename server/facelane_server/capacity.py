"""What a server can carry in time, and how much of each stream it takes: pure.

A server learns this from its own work. Every ``Reading`` says what streams offered since the
one before, what was answered and how old those answers were, and how busy the workers of each
pool and the front itself have been. What is busiest limits all: answers a second over its share
of busy time is the capacity, as long as that share says something.

While answers keep well within the target, nothing is held back: LATEST_WINS replaces what waits,
and that is the best thinning there is. Once they do not for longer than a moment, the budget of
pictures a second is set a little below what was answered, and then led by the answers' age, as a
sender on a network leads its window (slow start and congestion avoidance, RFC 5681): quickly up
while they are young, until they were late once; from near there on slowly, and quickly down when
they are not. It is shared out by weight, as the queue of a pool does (keys by their weight, then
the streams of each), and nobody is given more than it sends, so all streams of a kind are thinned
alike. What has piled up meanwhile is let off first.

Where it is decoding that cannot keep up, fewer pictures of a stream of video help little: all of it
is decoded. There, or where no stream of video gives way further, whole groups of pictures are left
out, as many of each stream, so that what is taken of the others keeps its age.

A target that one picture alone does not meet cannot be kept by taking fewer: there, half as long
again as that counts.

Nothing here knows a loop or a clock; times are arguments, rates are pictures a second.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

PERIOD_S: Final = 0.25
"""Between two readings."""
_WINDOW: Final = 4
"""Readings that are looked at together."""
_ENOUGH: Final = 12
"""Answers whose ages say something."""
_LATE: Final = 2
"""Readings in a row whose answers must be late for fewer pictures to help. A moment in which
nothing went on, as machines have that others share, makes one late, whatever had been taken."""
_HOLD: Final = 6
"""Readings after a step down in which its effect is waited for."""
_SETPOINT: Final = 0.7
"""Of the target: the age of all but one in twenty answers that the budget is led to."""
_HIGH: Final = 0.95
"""Of the target: the same age from which on streams are thinned."""
_BUSY: Final = 0.8
"""Share of its time that something must have been busy before age is taken for overload."""
_FULL: Final = 0.9
"""Of what can be answered at most, this much is taken on."""
_LEAST: Final = 0.8
"""Of the same: what thinning never falls below; fewer pictures would help nobody."""
_MOST: Final = 1.1
"""Of the same: what a budget never exceeds, so that it is near when it is needed."""
_YOUNG: Final = 0.3
"""Part of the setpoint by which answers are younger than it for the budget to grow quickly."""
_GROWTH: Final = 0.3
"""What the budget grows by at a reading while answers are far younger than they may be."""
_MOST_YOUNG: Final = 1.6
"""As ``_MOST``, while answers are young."""
_FAST: Final = 1.5
"""What the budget grows by at a reading while answers are young and nothing was late at so much."""
_MOST_FAST: Final = 2.5
"""As ``_MOST``, then."""
_NEAR: Final = 0.9
"""Of the budget at which answers were late the last time: up to here it grows fast."""
_FORGOTTEN: Final = 1.01
"""What that budget grows by at a reading: what was too much once need not be so for ever."""
_OPENING: Final = 0.25
"""Share of streams without a first result from which on nothing is held back for being late: their
decoders are opened, and all their faces are new."""
_PATIENCE: Final = 12
"""Readings that this may last."""
_VIDEO_AT_ONCE: Final = 4
"""Of a stream of video every fourth picture is taken at least: those between are decoded all the
same, some of them with it, and fewer would only make answers late."""
_STARVED: Final = 0.12
"""Of the target: what access units must wait for those who decode before that is the limit."""
_FED: Final = 0.06
"""The same, up to which there is room for more groups of pictures; while answers are far younger
than they may be, up to ``_STARVED``: those that come in one job wait for each other."""
_LEAST_GROUPS: Final = 0.1
"""Of the groups of pictures of video, what is taken of them at least."""
_FEWER: Final = 0.6
"""What is left of their part at the most when answers are late once more."""
_SOON: Final = -0.8
"""How much too old answers are taken to be that are young, while access units wait for long."""
_BACK: Final = 1.03
"""What that part grows by at a reading while answers are young, up to ``_NEAR_GROUPS`` of where
they were late the last time."""
_NEAR_GROUPS: Final = 0.75
_ON: Final = 1.01
"""The same from there on."""
_LONGEST: Final = 24
"""Readings for which the effect of a step is waited for at most, however long groups are."""
_ENOUGH_OF: Final = 1.0 - 1e-6
"""Of what is asked for, where sums are rounded."""
_SPARE: Final = 1.05
"""Of what is offered: a budget that holds nothing back."""
_WHOLE: Final = 0.98
"""Of what a stream sends: from this rate on it is taken whole."""
_ROOM: Final = 1_000_000
"""Streams more, which are told of at most."""
_KNOWN: Final = 0.3
"""Share of busy time from which on it says what more would fit."""
_ALONE: Final = 1.5
"""Of the time that a picture takes alone: the least target that can be kept."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a stream sends: pictures a second, and whose they are.

    ``lossless``: it is pushed back by its own window and never thinned; it has its share.
    ``video``: every picture of it is decoded, taken or not; a key frame comes every ``group_s``
    seconds (0 = not known).
    """

    lane: int
    fps: float
    key: str = ""
    key_weight: int = 1
    weight: int = 10
    lossless: bool = False
    video: bool = False
    group_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What happened in the ``seconds`` since the reading before.

    ``answered``: results of streams. ``ages_s``: of those among them that can be thinned.
    ``busy``: for each that works, the share of its time, 0-1. ``alone_s``: what a picture would
    take in the workers if it were the only one. ``wait_s``: what waits for workers now would take
    them so long; of what can be thinned, as the ages are. ``opening``: streams that had no result
    at the reading before; what they have now is not among the ages. ``decoding_s``: how long
    access units wait for those who decode them.
    """

    seconds: float
    demands: Sequence[Demand]
    answered: int
    ages_s: Sequence[float]
    busy: Mapping[str, float]
    alone_s: float = 0.0
    wait_s: float = 0.0
    opening: int = 0
    decoding_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a server carries. ``capacity``: in pictures a second, within the target; ``headroom``:
    streams more at the mean rate of those there are; ``thinned``: streams that give way."""

    offered: float
    capacity: float
    headroom: int
    thinned: int

    @property
    def ratio(self) -> float:
        return self.offered / self.capacity if self.capacity else 0.0


def fair_rates(demands: Iterable[Demand], budget: float) -> dict[int, float]:
    """A budget of pictures a second shared out over streams: max-min fair by weight, first between
    keys, then between the streams of each; nobody is given more than it sends."""
    by_key: dict[str, list[Demand]] = {}
    for demand in demands:
        by_key.setdefault(demand.key, []).append(demand)
    wanted = [(float(lanes[0].key_weight), sum(d.fps for d in lanes)) for lanes in by_key.values()]
    rates: dict[int, float] = {}
    for lanes, share in zip(by_key.values(), _filled(wanted, budget), strict=True):
        given = _filled([(float(d.weight), d.fps) for d in lanes], share)
        rates.update((d.lane, rate) for d, rate in zip(lanes, given, strict=True))
    return rates


def _is_thinned_video(demand: Demand) -> bool:
    return demand.video and not demand.lossless


def _filled(wanted: Sequence[tuple[float, float]], budget: float) -> list[float]:
    """For (weight, wanted) each: its part of the budget. Filled like vessels that stand beside
    one another, as wide as their weight and as high as what is wanted over it."""
    given = [0.0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i][1] / max(wanted[i][0], 1e-9))
    left, weights = max(budget, 0.0), sum(max(w, 1e-9) for w, _ in wanted)
    for i in order:
        weight, want = max(wanted[i][0], 1e-9), wanted[i][1]
        given[i] = min(want, left * weight / weights) if weights > 0 else 0.0
        left -= given[i]
        weights -= weight
    return given


@dataclass(slots=True)
class _Stream:
    """What is known of one stream: its rate, smoothed."""

    fps: float
    seen: int = 0


@dataclass(slots=True)
class Capacity:
    """See the module. ``target_s``: of the age of answers; ``min_fps``: what every stream is let
    in for. ``step`` takes a reading and gives the rates of the streams that are thinned."""

    target_s: float
    min_fps: float
    budget: float | None = None
    """Pictures a second that are shared out; ``None`` = nothing is held back."""
    groups: float = 1.0
    """Part of the groups of pictures that is taken of each stream of video that is thinned."""
    _readings: deque[Reading] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _demands: tuple[Demand, ...] = ()
    _rates: dict[int, float] = field(default_factory=dict)
    _alone_s: float = 0.0
    _hold: int = 0
    _groups_hold: int = 0
    """Readings in which the effect of a step is waited for."""
    _calm: int = 0
    _led: int = 0
    """Readings since there is a budget: the first one is a guess from what was answered while
    much was only beginning, and nobody is refused for it."""
    _ceiling: float = math.inf
    """The budget at which answers were late the last time."""
    _groups_ceiling: float = 1.0
    """That part when answers were late the last time."""
    _grown: bool = True
    """Since that part was made less."""
    _pinned: bool = False
    """No stream of video gives way further than it does."""
    _late: int = 0
    """Readings in a row whose answers were late."""
    _opening: int = 0
    """Readings in a row in which many streams were."""

    # -- what is known ----------------------------------------------------------------------

    @property
    def load(self) -> Load | None:
        """``None`` while there was too little to learn from."""
        capacity = self._capacity()
        if capacity is None:
            return None
        offered = sum(d.fps for d in self._demands)
        senders = [d.fps for d in self._demands if d.fps > 0]
        mean = sum(senders) / len(senders) if senders else 0.0
        room = 0.0 if self.budget is not None or not mean else (capacity - offered) / mean
        # Of streams that send next to nothing any number would fit.
        return Load(offered, capacity, int(max(0.0, min(room, _ROOM))), len(self._rates))

    def room(self, newcomer: Demand, open_lanes: Iterable[Demand]) -> int | None:
        """``None`` when one stream more may be let in: when its key's part is enough for all that
        the key has open; else how many such fit at ``min_fps``.

        ``open_lanes``: those that are open, also the ones that no reading has seen yet.
        """
        capacity = self._capacity()
        known = {d.lane: d for d in self._demands}
        others = [known.get(d.lane, d) for d in open_lanes]
        if capacity is None or self._led < _WINDOW or not any(d.fps > 0 for d in others):
            return None  # what was learnt of streams that have left says nothing of these
        least = self.min_fps
        asked = [self._at_most(d, least) for d in (*others, newcomer)]
        rates = fair_rates(asked, capacity)
        # Those of its own key: how many others have open takes nothing of that key's part.
        own = (d for d in asked if d.key == newcomer.key)
        if all(rates[d.lane] >= _ENOUGH_OF * d.fps for d in own):
            return None
        return int(capacity / least)

    def first_rate(self, newcomer: Demand) -> float | None:
        """What a stream that has just been opened is given until the next reading."""
        if self.budget is None:
            return None
        asked = Demand(newcomer.lane, math.inf, newcomer.key, newcomer.key_weight, newcomer.weight)
        return fair_rates([*self._demands, asked], self.budget)[newcomer.lane]

    @staticmethod
    def _at_most(demand: Demand, fps: float) -> Demand:
        asked = min(demand.fps, fps) if demand.fps > 0 else fps
        return Demand(demand.lane, asked, demand.key, demand.key_weight, demand.weight)

    def _capacity(self) -> float | None:
        if self.budget is not None:
            return self.budget
        busiest = self._busiest()
        return _FULL * self._answered() / busiest if busiest >= _KNOWN else None

    # -- what follows -----------------------------------------------------------------------

    def step(self, reading: Reading) -> dict[int, float]:
        """The rates of the streams that are thinned from now on; the others are taken whole."""
        if reading.seconds <= 0:
            return self._rates
        self._readings.append(reading)
        self._demands = self._smoothed(reading)
        if reading.alone_s > 0:
            known = self._alone_s or reading.alone_s
            self._alone_s = known + 0.2 * (reading.alone_s - known)
        target = max(self.target_s, _ALONE * self._alone_s)
        age = self._age()
        many = reading.opening > _OPENING * len(reading.demands)
        self._opening = self._opening + 1 if many else 0
        if self.budget is None:
            if not 0 < self._opening <= _PATIENCE:
                self._begin(age, reading.wait_s, target)
        else:
            self._lead(age, reading.wait_s, target)
        # What has piled up is worked off before more is taken on. What waits while answers are
        # young is the newest of each stream, and is replaced.
        late = age is None or age > _SETPOINT * target
        piled_up = late and reading.wait_s > 0.5 * target
        self._rates = self._thinned(0.1 if piled_up else 1.0)
        return self._rates

    def _begin(self, age: float | None, wait_s: float, target: float) -> None:
        late = self._stays_late(age is not None and age > _HIGH * target, wait_s, target)
        answered = self._answered()
        if late and self._busiest() > _BUSY and answered > 0:
            self.budget = _FULL * answered
            if self._is_starved(target):
                self._take_fewer_groups(-1.0 if age is None else 1.0 - age / (_SETPOINT * target))
                self.budget = max(self.budget, _SPARE * self._offered())
            self._hold, self._calm, self._led = _HOLD, 0, 0
            self._ceiling = math.inf

    def _stays_late(self, late: bool, wait_s: float, target: float) -> bool:
        """``late``: the answers of this reading were."""
        self._late = self._late + 1 if late else 0
        return self._late >= _LATE or wait_s > target

    def _lead(self, age: float | None, wait_s: float, target: float) -> None:
        assert self.budget is not None
        self._led += 1
        busiest, answered = self._busiest(), self._answered()
        if not self._demands:
            self._let_go()  # there is nobody to hold back
            return
        if answered <= 0:
            # Nobody sends, or nobody works (a pool is gone): fewer pictures would not help.
            self._calm += 1
            if self._calm >= 2 * _WINDOW:
                self._let_go()
            return
        able = answered / max(busiest, 1e-6)
        setpoint = _SETPOINT * target
        self._hold -= 1
        self._groups_hold -= 1
        young = 1.0 if age is None else 1.0 - age / setpoint
        self._ceiling *= _FORGOTTEN
        whole = self.groups == 1.0  # else more of each group would be taken in turns
        fast = whole and young > _YOUNG and _FAST * self.budget <= _NEAR * self._ceiling
        late = self._stays_late(young < 0.0, wait_s, target)
        self._lead_groups(young, target, late=late)
        if young < 0.0:
            if self._hold <= 0 and late and not self._is_starved(target):
                self._ceiling = self.budget
                self.budget *= max(0.8, 1.0 + 0.1 * young)
                self._hold = _HOLD
        else:
            if fast:
                self.budget *= _FAST
            elif self._hold <= 0:
                self.budget *= 1.01 + _GROWTH * max(0.0, young - _YOUNG)
        # Workers that take a picture at a time look as busy as those that take eight in the same
        # time: while answers are young, more may fit than their business says.
        most = _MOST if young < _YOUNG else _MOST_FAST if fast else _MOST_YOUNG
        self.budget = min(max(self.budget, _LEAST * able), most * able)
        offered = self._offered()
        if self.budget >= _SPARE * offered:
            self.budget = _SPARE * offered
            self._calm += 1
            if self._calm >= _WINDOW and self.groups == 1.0:
                self._let_go()
        else:
            self._calm = 0

    def _let_go(self) -> None:
        self.budget = None
        self.groups = self._groups_ceiling = 1.0
        self._grown = True
        self._pinned = False

    def _thinned(self, part: float) -> dict[int, float]:
        if self.budget is None:
            return {}
        asked = [replace(d, fps=self._may_send(d)) for d in self._demands]
        rates = fair_rates(asked, self.budget)
        least = {d.lane: d.fps / _VIDEO_AT_ONCE for d in asked if _is_thinned_video(d)}
        self._pinned = bool(least) and all(rates[lane] <= fps for lane, fps in least.items())
        if part < 1.0:
            rates = fair_rates(asked, part * self.budget)
        for lane, fps in least.items():
            rates[lane] = max(rates[lane], fps)
        thinned: dict[int, float] = {}
        for demand, may in zip(self._demands, asked, strict=True):
            rate = rates[demand.lane]
            if not demand.lossless and (rate < _WHOLE * may.fps or may.fps < demand.fps):
                # Of the groups that are taken all pictures are, though a rate is never exact.
                thinned[demand.lane] = rate if rate < _WHOLE * may.fps else _SPARE * may.fps
        return thinned

    # -- groups of pictures -------------------------------------------------------------------

    def _may_send(self, demand: Demand) -> float:
        """Pictures a second of the stream in the groups that are taken."""
        return demand.fps * self.groups if _is_thinned_video(demand) else demand.fps

    def _offered(self) -> float:
        return sum(map(self._may_send, self._demands))

    def _is_starved(self, target: float) -> bool:
        video = any(map(_is_thinned_video, self._demands))
        return video and self._decoding_s() > _STARVED * target

    def _lead_groups(self, young: float, target: float, *, late: bool) -> None:
        if self._groups_hold > 0:
            return
        if self._is_starved(target):
            self._take_fewer_groups(min(young, _SOON))  # or they will be late
        elif young < 0.0:
            if late and self._pinned and self._hold <= 0:
                self._take_fewer_groups(young)
        else:
            self._take_more_groups(fed=young > _YOUNG or self._decoding_s() < _FED * target)

    def _take_fewer_groups(self, young: float) -> None:
        """``young``: below 0, by how much of the setpoint answers are too old."""
        if self._grown:  # else it is still the step before that is late
            self._groups_ceiling, self._grown = self.groups, False
        self.groups = max(_LEAST_GROUPS, self.groups * max(_FEWER, 1.0 + 0.12 * young))
        self._groups_hold = self._holding()

    def _take_more_groups(self, *, fed: bool) -> None:
        self._groups_ceiling = min(1.0, self._groups_ceiling * _FORGOTTEN)
        if fed:
            near = self.groups >= _NEAR_GROUPS * self._groups_ceiling
            self.groups = min(1.0, self.groups * (_ON if near else _BACK))
            self._grown = True

    def _holding(self) -> int:
        """Readings until a step shows its effect: once each stream has begun a group."""
        longest = max((d.group_s for d in self._demands if _is_thinned_video(d)), default=0.0)
        return max(_HOLD, min(_LONGEST, _WINDOW + math.ceil(longest / PERIOD_S)))

    # -- what the last readings say -----------------------------------------------------------

    def _smoothed(self, reading: Reading) -> tuple[Demand, ...]:
        streams: dict[int, _Stream] = {}
        demands = []
        for demand in reading.demands:
            stream = self._streams.get(demand.lane) or _Stream(demand.fps)
            stream.seen += 1
            # The mean at first, then with a memory of two seconds.
            part = max(1.0 / stream.seen, min(1.0, reading.seconds / 2.0))
            stream.fps += part * (demand.fps - stream.fps)
            streams[demand.lane] = stream
            demands.append(
                Demand(
                    demand.lane,
                    stream.fps,
                    demand.key,
                    demand.key_weight,
                    demand.weight,
                    demand.lossless,
                    demand.video,
                    demand.group_s,
                )
            )
        self._streams = streams
        return tuple(demands)

    def _seconds(self) -> float:
        return sum(r.seconds for r in self._readings)

    def _answered(self) -> float:
        """A second."""
        seconds = self._seconds()
        return sum(r.answered for r in self._readings) / seconds if seconds else 0.0

    def _decoding_s(self) -> float:
        newest = list(self._readings)[-_LATE:]
        return sum(r.decoding_s for r in newest) / max(1, len(newest))

    def _busiest(self) -> float:
        seconds = self._seconds()
        totals: dict[str, float] = {}
        for reading in self._readings:
            for name, share in reading.busy.items():
                totals[name] = totals.get(name, 0.0) + share * reading.seconds
        return min(1.0, max(totals.values(), default=0.0) / seconds) if seconds else 0.0

    def _age(self) -> float | None:
        """Of all but one in twenty answers: of as many of the newest readings as say something."""
        ages: list[float] = []
        for reading in reversed(self._readings):
            ages += reading.ages_s
            if len(ages) >= _ENOUGH:
                break
        ages.sort()
        return ages[min(len(ages) - 1, int(0.95 * len(ages)))] if ages else None
