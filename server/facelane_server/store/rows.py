"""Rows of subjects and templates: how they are asked for, what becomes of them, and pages."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import sqlalchemy as sa

from facelane_server.naming import is_identifier
from facelane_server.store.records import Correction, Template, invalid
from facelane_server.store.schema import keys, subjects, templates
from facelane_server.store.vault import KEY_COLUMNS, OF_SUBJECT


def subject_query() -> sa.Select[Any]:
    count = (
        sa.select(sa.func.count())
        .where(templates.c.subject == subjects.c.id, templates.c.correction != Correction.NOT)
        .scalar_subquery()
        .label("template_count")
    )
    return sa.select(subjects, count, *KEY_COLUMNS).join(keys, OF_SUBJECT, isouter=True)


def template_query() -> sa.Select[Any]:
    return (
        sa.select(
            templates.c.template_id,
            subjects.c.subject_id,
            subjects.c.id.label("number"),
            subjects.c.sealed,
            *KEY_COLUMNS,
            templates.c.model_id,
            templates.c.ood_score,
            templates.c.created_ns,
            templates.c.quality,
            templates.c.correction,
        )
        .join_from(templates, subjects)
        .join(keys, OF_SUBJECT, isouter=True)
    )


def as_template(row: sa.Row[Any], subject_id: str) -> Template:
    return Template(
        template_id=row.template_id,
        subject_id=subject_id,
        model_id=row.model_id,
        ood_score=row.ood_score,
        created_ns=row.created_ns,
        quality=row.quality,
        correction=Correction(row.correction),
    )


def page_token_of(subject_id: str) -> str:
    return base64.urlsafe_b64encode(subject_id.encode()).decode().rstrip("=")


def read_page_token(token: str) -> str:
    if not token:
        return ""
    try:
        subject_id = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        subject_id = ""
    if not is_identifier(subject_id):
        raise invalid("page_token", "it is not one that a list call gave; start without one")
    return subject_id
