"""Subjects and templates at rest, in SQLAlchemy Core.

Everything here is synchronous. Neither errors nor logs ever hold a subject's name or a vector.
Times are nanoseconds since the epoch. Enrolments are remembered for a day, so that a client may
repeat one safely; their number is bounded by ``limits.MAX_REQUEST_IDS``.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.naming import check_identifier, gallery_name
from facelane_server.store import audit, following
from facelane_server.store.audit import Action, AuditLog, Deed
from facelane_server.store.chips import Chips
from facelane_server.store.chips import keep as keep_chip
from facelane_server.store.database import Database
from facelane_server.store.envelope import Lock
from facelane_server.store.following import ChangeKind, StoredChange
from facelane_server.store.listed import SortedIds
from facelane_server.store.records import (
    F16,
    Correction,
    Deleted,
    Enrolled,
    NewTemplate,
    RequestKey,
    StoredVector,
    Subject,
    Template,
    check_display_name,
    check_etag,
    check_labels,
    invalid,
    subject_missing,
    unit_float16,
)
from facelane_server.store.remembered import recalled, remember
from facelane_server.store.rows import (
    as_template,
    page_token_of,
    read_page_token,
    subject_query,
    template_query,
)
from facelane_server.store.schema import (
    AUDIT,
    GALLERY,
    galleries,
    keys,
    requests,
    revision,
    subjects,
    templates,
)
from facelane_server.store.sqlite import SqliteFile
from facelane_server.store.vault import Person, Vault, open_vault

DUPLICATE_SIMILARITY: Final = 0.999
"""Two shots of one person never come so near; the same picture enrolled again does
(float16 and another batch size move a cosine by less than 5e-4)."""


class Store:
    """All galleries of one store, from any thread; ``close`` ends the store.

    Every method is one transaction. Besides the reasons that each names, all raise
    GALLERY_UNAVAILABLE; see ``Database``.
    """

    def __init__(
        self,
        place: Path | Database,
        *,
        max_templates: int = limits.MAX_TEMPLATES,
        clock_ns: Callable[[], int] = time.time_ns,
        look: bool = False,
        vault: Vault | None = None,
    ) -> None:
        """``place``: a store that is open, or a file that is opened, made, or with ``look`` only
        looked at; see ``SqliteFile``. ``vault``: the store's keys; None where it is not sealed."""
        self.database = SqliteFile(place, look=look) if isinstance(place, Path) else place
        try:
            self._vault = vault or open_vault(self.database)
        except BaseException:
            self.database.close()
            raise
        self.listed = SortedIds(self._vault)
        self.audit = AuditLog(self.database, self._vault, clock_ns=clock_ns)
        self.chips = Chips(self.database, self._vault)
        self._max_templates = max_templates
        self._clock_ns = clock_ns

    @property
    def vault(self) -> Vault:
        """The store's keys."""
        return self._vault

    def close(self) -> None:
        """Gives the store back; idempotent."""
        self.database.close()

    @contextlib.contextmanager
    def _changing(
        self, action: Action, gallery_id: str, subject_id: str = "", **told: str
    ) -> Iterator[sa.Connection]:
        """A transaction that is written down in the audit log, or not done."""
        deed = Deed(action, audit.actor(), gallery_id, subject_id, tuple(told.items()))
        with self.database.writing(GALLERY, AUDIT) as connection:
            yield connection
            self.audit.append(connection, [deed])

    # subjects

    def create_subject(
        self, gallery_id: str, subject_id: str, display_name: str, labels: Mapping[str, str]
    ) -> Subject:
        """Raises SUBJECT_EXISTS, ARGUMENT_INVALID."""
        gallery_id = gallery_name(gallery_id)
        check_identifier(subject_id, "subject_id")
        check_display_name(display_name)
        kept = check_labels(labels)
        with self._changing(Action.SUBJECT_CREATED, gallery_id, subject_id) as connection:
            if self._find(connection, gallery_id, subject_id) is not None:
                raise FacelaneError(
                    Reason.SUBJECT_EXISTS,
                    "the gallery has this subject already; update it, or choose another id",
                )
            self._insert_subject(connection, gallery_id, Person(subject_id, display_name, kept))
            return self._subject(connection, gallery_id, subject_id)

    def _insert_subject(
        self, connection: sa.Connection, gallery_id: str, person: Person
    ) -> tuple[int, Lock | None]:
        """Its number, and its lock where there are any."""
        now = self._clock_ns()
        if not connection.scalar(
            sa.select(galleries.c.gallery_id).where(galleries.c.gallery_id == gallery_id)
        ):
            connection.execute(
                sa.insert(galleries).values(gallery_id=gallery_id, settings={}, created_ns=now)
            )
        number = following.append(connection, ChangeKind.SUBJECT)
        lock = self._vault.new_lock(connection, number) if self._vault.encrypts else None
        connection.execute(
            sa.insert(subjects).values(
                id=number,
                gallery_id=gallery_id,
                **self._vault.columns(lock, number, gallery_id, person),
                etag=secrets.token_hex(8),
                created_ns=now,
                updated_ns=now,
            )
        )
        return number, lock

    def get_subject(self, gallery_id: str, subject_id: str) -> Subject:
        """Raises SUBJECT_NOT_FOUND."""
        with self.database.reading() as connection:
            return self._subject(connection, gallery_name(gallery_id), subject_id)

    def list_subjects(
        self, gallery_id: str, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[tuple[Subject, ...], str]:
        """One page in the order of subject ids, and the token of the next ("" = the last).

        ``page_size`` 0 means 100. Raises ARGUMENT_INVALID for a foreign token.
        """
        size = min(page_size or 100, limits.MAX_PAGE_SIZE)
        if size < 0:
            raise invalid("page_size", "must not be negative")
        after = read_page_token(page_token)
        query = subject_query().where(subjects.c.gallery_id == gallery_name(gallery_id))
        with self.database.reading() as connection:
            if self._vault.encrypts:
                numbers = self.listed.after(connection, gallery_name(gallery_id), after, size + 1)
                query = query.where(subjects.c.id.in_(numbers))
            else:
                query = query.where(subjects.c.subject_id > after).limit(size + 1)
                query = query.order_by(subjects.c.subject_id)
            rows = connection.execute(query).all()
            found = [self._as_subject(connection, row) for row in rows]
        found.sort(key=lambda subject: subject.subject_id)
        page = tuple(found[:size])
        return page, page_token_of(page[-1].subject_id) if len(found) > size else ""

    def update_subject(
        self,
        gallery_id: str,
        subject_id: str,
        *,
        display_name: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
    ) -> Subject:
        """Changes what is not ``None``. Raises SUBJECT_NOT_FOUND, ETAG_MISMATCH (when ``etag``
        is given and not the current one), ARGUMENT_INVALID."""
        gallery_id = gallery_name(gallery_id)
        values: dict[str, Any] = {}
        if display_name is not None:
            values["display_name"] = check_display_name(display_name)
        if labels is not None:
            values["labels"] = check_labels(labels)
        with self._changing(Action.SUBJECT_UPDATED, gallery_id, subject_id) as connection:
            current = self._subject(connection, gallery_id, subject_id)
            check_etag(etag, current)
            if values:
                key = self._find(connection, gallery_id, subject_id)
                assert key is not None
                lock = self._vault.lock_of(connection, key) if self._vault.encrypts else None
                person = Person(
                    subject_id,
                    values.get("display_name", current.display_name),
                    values.get("labels", current.labels),
                )
                columns = self._vault.columns(lock, key, gallery_id, person)
                self._touch(connection, key, **columns)
                following.append(connection, ChangeKind.SUBJECT, subject=key)
            return self._subject(connection, gallery_id, subject_id)

    def delete_subject(
        self, gallery_id: str, subject_id: str, *, etag: str = "", why: str = ""
    ) -> Deleted:
        """Deletes the subject and its templates. ``why``: for the audit log. Raises
        SUBJECT_NOT_FOUND, ETAG_MISMATCH (see ``update_subject``)."""
        gallery_id = gallery_name(gallery_id)
        told = (("why", why),) if why else ()
        deed = Deed(Action.SUBJECT_DELETED, audit.actor(), gallery_id, subject_id, told)
        with self.database.writing(GALLERY, AUDIT) as connection:
            key = self._find(connection, gallery_id, subject_id)
            if key is None:
                raise subject_missing()
            check_etag(etag, self._subject(connection, gallery_id, subject_id))
            owned = sa.select(templates.c.template_id).where(templates.c.subject == key)
            connection.execute(
                sa.update(requests)
                .where(requests.c.template_id.in_(owned))
                .values(answer=sa.null())
            )
            gone = connection.execute(sa.delete(templates).where(templates.c.subject == key))
            connection.execute(sa.delete(keys).where(keys.c.subject == key))
            connection.execute(sa.delete(subjects).where(subjects.c.id == key))
            at = following.append(connection, ChangeKind.SUBJECT_REMOVED, subject=key)
            if self._vault.encrypts:
                self._vault.erased(connection)
            head = self.audit.append(connection, [deed])
            receipt = self.audit.receipt(connection, deed, head, key, gone.rowcount)
        self.database.forget_deleted()
        return Deleted(key, int(gone.rowcount), at, receipt)

    def _find(self, connection: sa.Connection, gallery_id: str, subject_id: str) -> int | None:
        found: int | None = connection.scalar(
            sa.select(subjects.c.id)
            .where(subjects.c.gallery_id == gallery_id)
            .where(subjects.c.subject_id == self._vault.blind("subject", gallery_id, subject_id))
        )
        return found

    def _subject(self, connection: sa.Connection, gallery_id: str, subject_id: str) -> Subject:
        row = connection.execute(
            subject_query()
            .where(subjects.c.gallery_id == gallery_id)
            .where(subjects.c.subject_id == self._vault.blind("subject", gallery_id, subject_id))
        ).first()
        if row is None:
            raise subject_missing()
        return self._as_subject(connection, row)

    def _as_subject(self, connection: sa.Connection, row: sa.Row[Any]) -> Subject:
        if self._vault.encrypts:
            person = self._vault.person(
                self._vault.lock(connection, row.id, row), row.id, row.sealed
            )
        else:
            person = Person(row.subject_id, row.display_name, row.labels)
        return Subject(
            gallery_id=row.gallery_id,
            subject_id=person.subject_id,
            display_name=person.display_name,
            labels=person.labels,
            etag=row.etag,
            created_ns=row.created_ns,
            updated_ns=row.updated_ns,
            template_count=row.template_count,
        )

    def _touch(self, connection: sa.Connection, number: int, **values: Any) -> None:
        connection.execute(
            sa.update(subjects)
            .where(subjects.c.id == number)
            .values(etag=secrets.token_hex(8), updated_ns=self._clock_ns(), **values)
        )

    # templates

    def list_templates(
        self, gallery_id: str, subject_id: str, *, corrections: bool = False
    ) -> tuple[Template, ...]:
        """Oldest first; or what came of ``corrections``. Raises SUBJECT_NOT_FOUND."""
        kind = templates.c.correction
        wanted = kind != Correction.NONE if corrections else kind != Correction.NOT
        with self.database.reading() as connection:
            key = self._find(connection, gallery_name(gallery_id), subject_id)
            if key is None:
                raise subject_missing()
            rows = connection.execute(
                template_query().where(templates.c.subject == key, wanted).order_by(templates.c.id)
            )
            return tuple(as_template(row, subject_id) for row in rows)

    def delete_template(self, gallery_id: str, template_id: str, *, undo: bool = False) -> Template:
        """What was deleted; ``undo``: of a correction alone. Raises TEMPLATE_NOT_FOUND."""
        gallery_id = gallery_name(gallery_id)
        action = Action.CORRECTION_UNDONE if undo else Action.TEMPLATE_DELETED
        with self._changing(action, gallery_id, template=template_id) as connection:
            template = self._template(connection, gallery_id, template_id)
            if template is None or (undo and not template.correction):
                raise FacelaneError(
                    Reason.TEMPLATE_NOT_FOUND,
                    "the gallery has no such template; list the subject's templates",
                )
            connection.execute(
                sa.update(requests)
                .where(requests.c.template_id == template_id)
                .values(answer=sa.null())
            )
            key = self._find(connection, gallery_id, template.subject_id)
            assert key is not None
            connection.execute(sa.delete(templates).where(templates.c.template_id == template_id))
            self._touch(connection, key)
            following.append(
                connection,
                ChangeKind.TEMPLATE_REMOVED,
                subject=key,
                template_id=template_id,
            )
        self.database.forget_deleted()
        return template

    def _template(
        self, connection: sa.Connection, gallery_id: str, template_id: str
    ) -> Template | None:
        row = connection.execute(
            template_query()
            .where(subjects.c.gallery_id == gallery_id)
            .where(templates.c.template_id == template_id)
        ).first()
        if row is None:
            return None
        if not self._vault.encrypts:
            return as_template(row, row.subject_id)
        lock = self._vault.lock(connection, row.number, row)
        return as_template(row, self._vault.person(lock, row.number, row.sealed).subject_id)

    def enroll(
        self,
        gallery_id: str,
        subject_id: str,
        new: NewTemplate,
        *,
        create_subject: bool = False,
        display_name: str = "",
        request: RequestKey | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> Enrolled:
        """Adds a template. A picture that the subject has already (cosine of
        ``DUPLICATE_SIMILARITY`` or more under the same model) adds nothing and gives the
        template that is there.

        Raises SUBJECT_NOT_FOUND, GALLERY_FULL, REQUEST_ID_REUSED, TEMPLATE_NOT_FOUND (the
        request is known, and its template was deleted since), ARGUMENT_INVALID.
        """
        gallery_id = gallery_name(gallery_id)
        check_identifier(subject_id, "subject_id")
        check_display_name(display_name)
        vector = unit_float16(new.vector)
        action = Action.CORRECTED if new.correction else Action.ENROLLED
        told = {"says": new.correction.name} if new.correction else {}
        with self._changing(action, gallery_id, subject_id, **told) as connection:
            if request is not None:
                known = self._recall(connection, gallery_id, request)
                if known is not None:
                    return known
            key = self._find(connection, gallery_id, subject_id)
            if key is not None:
                lock = self._vault.lock_of(connection, key) if self._vault.encrypts else None
            elif create_subject:
                person = Person(subject_id, display_name, {})
                key, lock = self._insert_subject(connection, gallery_id, person)
            else:
                raise subject_missing()
            template = self._same_shot(connection, key, subject_id, lock, new, vector)
            created = template is None
            if template is None:
                self._check_room(connection, key)
                template = Template(
                    template_id=secrets.token_hex(16),
                    subject_id=subject_id,
                    model_id=new.model_id,
                    ood_score=new.ood_score,
                    created_ns=self._clock_ns(),
                    quality=new.quality,
                    correction=new.correction,
                )
                kept = vector.tobytes()
                if lock is not None:
                    kept = self._vault.sealed_vector(lock, template.template_id, kept)
                following.append(
                    connection,
                    ChangeKind.TEMPLATE_ADDED,
                    subject=key,
                    template_id=template.template_id,
                )
                connection.execute(
                    sa.insert(templates).values(
                        template_id=template.template_id,
                        subject=key,
                        model_id=template.model_id,
                        dim=len(vector),
                        vector=kept,
                        ood_score=template.ood_score,
                        created_ns=template.created_ns,
                        quality=template.quality,
                        correction=template.correction,
                    )
                )
                self._touch(connection, key)
            if new.chip:
                keep_chip(connection, self._vault, lock, template.template_id, new.chip)
            if request is not None:
                remember(
                    connection,
                    self._vault,
                    lock,
                    gallery_id,
                    request,
                    template.template_id,
                    answer,
                    self._clock_ns(),
                )
            subject = self._subject(connection, gallery_id, subject_id)
            best = connection.scalar(
                sa.select(sa.func.max(templates.c.quality))
                .where(templates.c.subject == key)
                .where(templates.c.model_id == new.model_id)
            )
            return Enrolled(subject, template, created, answer, best or 0.0)

    def _same_shot(
        self,
        connection: sa.Connection,
        key: int,
        subject_id: str,
        lock: Lock | None,
        new: NewTemplate,
        vector: F16,
    ) -> Template | None:
        rows = connection.execute(
            template_query()
            .add_columns(templates.c.vector)
            .where(templates.c.subject == key)
            .where(templates.c.model_id == new.model_id, templates.c.dim == len(vector))
            .where((templates.c.correction == Correction.NOT) == (new.correction is Correction.NOT))
        ).all()
        if not rows:
            return None
        found = (
            row.vector if lock is None else self._vault.vector(lock, row.template_id, row.vector)
            for row in rows
        )
        matrix = np.stack([np.frombuffer(one, np.float16) for one in found])
        cosines = matrix.astype(np.float32) @ vector.astype(np.float32)
        best = int(np.argmax(cosines))
        if cosines[best] < DUPLICATE_SIMILARITY:
            return None
        return as_template(rows[best], subject_id)

    def _check_room(self, connection: sa.Connection, key: int) -> None:
        count = sa.select(sa.func.count()).select_from(templates)
        if (connection.scalar(count) or 0) >= self._max_templates:
            raise FacelaneError(
                Reason.GALLERY_FULL,
                f"the server holds its {self._max_templates} templates; delete some, or raise "
                "gallery.max_templates",
                metadata={"limit": str(self._max_templates), "scope": "server"},
            )
        if (connection.scalar(count.where(templates.c.subject == key)) or 0) >= (
            limits.MAX_TEMPLATES_PER_SUBJECT
        ):
            raise FacelaneError(
                Reason.GALLERY_FULL,
                f"the subject has its {limits.MAX_TEMPLATES_PER_SUBJECT} templates; delete the "
                "worst first",
                metadata={"limit": str(limits.MAX_TEMPLATES_PER_SUBJECT), "scope": "subject"},
            )

    # idempotency

    def recall(self, gallery_id: str, request: RequestKey) -> Enrolled | None:
        """What an earlier enrolment with this request id gave. Raises REQUEST_ID_REUSED,
        TEMPLATE_NOT_FOUND."""
        with self.database.reading() as connection:
            return self._recall(connection, gallery_name(gallery_id), request)

    def _recall(
        self, connection: sa.Connection, gallery_id: str, request: RequestKey
    ) -> Enrolled | None:
        row = recalled(connection, self._vault, gallery_id, request, self._clock_ns())
        if row is None:
            return None
        template = self._template(connection, gallery_id, row.template_id)
        if template is None:
            raise FacelaneError(
                Reason.TEMPLATE_NOT_FOUND,
                "this request was carried out, and its template was deleted since; use a fresh "
                "request_id to enrol again",
            )
        subject = self._subject(connection, gallery_id, template.subject_id)
        answer = row.answer
        if answer is not None and self._vault.encrypts:
            number = self._find(connection, gallery_id, template.subject_id)
            assert number is not None
            lock = self._vault.lock_of(connection, number)
            answer = self._vault.answer(lock, row.template_id, answer)
        return Enrolled(subject, template, created=False, answer=answer)

    # for the index and the gauges

    def vectors(self, model_id: str, dim: int) -> Iterator[StoredVector]:
        """See ``following.vectors``."""
        with self.database.reading() as connection:
            yield from following.vectors(connection, model_id, dim, self.database.name, self._vault)

    @contextlib.contextmanager
    def loading(self, model_id: str, dim: int) -> Iterator[tuple[int, Iterator[StoredVector]]]:
        """The gallery's revision, and all templates of one model as of then."""
        with self.database.reading() as connection:
            seen = revision(connection, GALLERY)
            yield (
                seen,
                following.vectors(connection, model_id, dim, self.database.name, self._vault),
            )

    def revision(self) -> int:
        """Of the gallery's newest change."""
        with self.database.reading() as connection:
            return revision(connection, GALLERY)

    def last_removal(self) -> int:
        """The revision at which somebody was taken away last, as far as the log goes back."""
        with self.database.reading() as connection:
            return following.last_removal(connection)

    def changes(self, seen: int, model_id: str, dim: int) -> list[StoredChange]:
        """See ``following.after``."""
        with self.database.reading() as connection:
            return following.after(connection, seen, model_id, dim, self.database.name, self._vault)

    # the keys

    def erasing(self) -> Iterator[None]:
        """Leaves what was deleted to none of the keys that are left, where that is due; see
        ``Vault.turning``."""
        with self.database.reading() as connection:
            due = self._vault.is_erasure_due(connection)
        if due:
            yield from self._vault.turning(self.database)

    def renew_keys(self, offered: Sequence[Lock] | None = None) -> int:
        """Locks the store with the master key that is given now, where it is another one; how many
        keys that were. ``offered``: see ``Vault.turning``. Raises ``ConfigError``."""
        offered = self._vault.offered() if offered is None else offered
        with self.database.writing(GALLERY) as connection:
            return self._vault.rewrap(connection, offered)

    def check(self) -> str:
        """See ``Database.check``."""
        return self.database.check()

    def trouble(self) -> str:
        """See ``Database.trouble``."""
        return self.database.trouble()

    def counts(self) -> tuple[int, int]:
        """(subjects, templates) of all galleries."""
        with self.database.reading() as connection:
            return (
                connection.scalar(sa.select(sa.func.count()).select_from(subjects)) or 0,
                connection.scalar(sa.select(sa.func.count()).select_from(templates)) or 0,
            )
