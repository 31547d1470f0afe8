"""When subjects lost what they were known by, so that no name outlives its evidence.

A track is named by looks that were compared with a subject's templates. When one of those is
deleted, or all of them with the subject, whoever bears the name afterwards may be somebody else:
enrolled anew under the same id, or rightly this time. So a look, and a name, count for a subject
only where the look was asked for after its last loss.

Who that was is kept as a hash, which tells nobody's id to whoever reads this process's memory
after a deletion. Should two have the same one, a name counts less than it could.
"""

from __future__ import annotations

from facelane_server import limits

SubjectKey = tuple[str, str]
"""Gallery id, subject id."""


class Losses:
    """Moments are counted, from 1; a moment is taken before a look is asked for. Written under its
    owner's lock, read from any thread."""

    def __init__(self) -> None:
        self.now = 0
        """The newest loss."""
        self._all = 0
        """Everybody has lost something then."""
        self._last: dict[int, int] = {}

    def note(self, key: SubjectKey) -> None:
        """A subject loses a template."""
        moment, whose = self.now + 1, hash(key)
        self._last.pop(whose, None)
        self._last[whose] = moment
        if len(self._last) > limits.MAX_LOSSES:
            self._all = self._last.pop(next(iter(self._last)))
        self.now = moment  # last: whoever asks from here on is answered with it

    def note_all(self) -> None:
        """Everybody may have lost some."""
        self._all = self.now + 1
        self._last = {}
        self.now += 1

    def since(self, moment: int, gallery_id: str, subject_id: str) -> bool:
        """Whether a subject has lost anything after this moment."""
        return max(self._all, self._last.get(hash((gallery_id, subject_id)), 0)) > moment
