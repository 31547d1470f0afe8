"""Enrolments that are remembered, so that a client may repeat one safely."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from facelane_server import limits
from facelane_server.domain import FacelaneError, Reason
from facelane_server.store.envelope import Lock
from facelane_server.store.records import RequestKey
from facelane_server.store.schema import requests
from facelane_server.store.vault import Vault

REQUEST_MEMORY_NS: Final = 24 * 3600 * 1_000_000_000


def _digest(vault: Vault, request_id: str) -> str:
    """What is kept of a request's id: clients like to put a subject's into it, and the memory of
    requests outlives subjects."""
    return vault.blind("request", hashlib.sha256(request_id.encode()).hexdigest())


def recalled(
    connection: sa.Connection, vault: Vault, gallery_id: str, request: RequestKey, now_ns: int
) -> sa.Row[Any] | None:
    """The request's row (``template_id``, ``answer``), None = it was never carried out, or is
    forgotten. Raises REQUEST_ID_REUSED."""
    row = connection.execute(
        sa.select(requests)
        .where(requests.c.gallery_id == gallery_id)
        .where(requests.c.request_id == _digest(vault, request.request_id))
        .where(requests.c.created_ns >= now_ns - REQUEST_MEMORY_NS)
    ).first()
    if row is not None and not secrets.compare_digest(row.fingerprint, request.fingerprint):
        raise FacelaneError(
            Reason.REQUEST_ID_REUSED,
            "this request_id was used with other arguments; use a fresh one for every "
            "enrolment, and the same one only to repeat it",
        )
    return row


def remember(
    connection: sa.Connection,
    vault: Vault,
    lock: Lock | None,
    gallery_id: str,
    request: RequestKey,
    template_id: str,
    answer: Mapping[str, Any] | None,
    now_ns: int,
) -> None:
    """Keeps a request and its answer for a day; ``lock``: of the subject, where it is sealed."""
    connection.execute(
        sa.delete(requests).where(requests.c.created_ns < now_ns - REQUEST_MEMORY_NS)
    )
    oldest = (
        sa.select(requests.c.created_ns)
        .order_by(requests.c.created_ns.desc())
        .offset(limits.MAX_REQUEST_IDS - 1)
        .limit(1)
    )
    bound = connection.scalar(oldest)
    if bound is not None:
        connection.execute(sa.delete(requests).where(requests.c.created_ns <= bound))
    if answer is not None and lock is not None:
        answer = vault.sealed_answer(lock, template_id, answer)
    connection.execute(
        sa.insert(requests).values(
            gallery_id=gallery_id,
            request_id=_digest(vault, request.request_id),
            fingerprint=request.fingerprint,
            template_id=template_id,
            answer=sa.null() if answer is None else dict(answer),
            created_ns=now_ns,
        )
    )
