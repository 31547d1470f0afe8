"""``GalleryService``: the gallery and the pipeline behind protobuf. The gate turns a
``FacelaneError`` into the call's status."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from msgspec.structs import replace

from facelane.v1 import face_pb2
from facelane.v1 import gallery_service_pb2 as pb
from facelane.v1 import gallery_service_pb2_grpc as pb_grpc
from facelane_server import limits
from facelane_server.config import Config
from facelane_server.domain import Encoding, FacelaneError, Picture, Reading, Reason, Stage
from facelane_server.edge import convert, gate
from facelane_server.edge.controls import Controls
from facelane_server.edge.errors import Context
from facelane_server.edge.operations import for_confirmers
from facelane_server.edge.pictures import SinglePictures
from facelane_server.edge.quotas import Quotas
from facelane_server.edge.roles import Verb
from facelane_server.events import EventFeed, EventPictures
from facelane_server.events.feed import event_not_found
from facelane_server.gallery import correction, enrolment, verification
from facelane_server.gallery.asked import Asked
from facelane_server.gallery.decide import Thresholds
from facelane_server.gallery.gallery import Gallery
from facelane_server.gallery.index import model_changing
from facelane_server.gallery.trail import Trail
from facelane_server.pipeline import Pipeline, Plan
from facelane_server.store.audit import Action
from facelane_server.store.pictures import not_found as picture_not_found
from facelane_server.store.records import Correction, Subject, Template


class GalleryService(pb_grpc.GalleryServiceServicer):
    def __init__(
        self,
        config: Config,
        gallery: Gallery,
        pictures: SinglePictures,
        pipeline: Pipeline,
        controls: Controls,
        events: EventFeed,
        quotas: Quotas,
        trail: Trail,
        kept: EventPictures,
    ) -> None:
        self._config = config
        self._gallery = gallery
        self._pictures = pictures
        self._pipeline = pipeline
        self._controls = controls
        self._events = events
        self._quotas = quotas
        self._trail = trail
        self._kept = kept

    # -- subjects ------------------------------------------------------------------------

    async def CreateSubject(
        self, request: pb.CreateSubjectRequest, context: Context
    ) -> pb.CreateSubjectResponse:
        subject = await self._gallery.create_subject(
            _gallery(request.gallery_id, "gallery.write"),
            request.subject_id,
            request.display_name,
            _labels(request.labels),
        )
        return pb.CreateSubjectResponse(subject=_subject(subject))

    async def GetSubject(
        self, request: pb.GetSubjectRequest, context: Context
    ) -> pb.GetSubjectResponse:
        subject = await self._gallery.get_subject(
            _gallery(request.gallery_id, "gallery.read"), request.subject_id
        )
        return pb.GetSubjectResponse(subject=_subject(subject))

    async def ListSubjects(
        self, request: pb.ListSubjectsRequest, context: Context
    ) -> pb.ListSubjectsResponse:
        subjects, token = await self._gallery.list_subjects(
            _gallery(request.gallery_id, "gallery.read"),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListSubjectsResponse(
            subjects=[_subject(s) for s in subjects], next_page_token=token
        )

    async def UpdateSubject(
        self, request: pb.UpdateSubjectRequest, context: Context
    ) -> pb.UpdateSubjectResponse:
        paths = set(request.update_mask.paths) or {"display_name", "labels"}
        if unknown := paths - {"display_name", "labels"}:
            raise FacelaneError(
                Reason.ARGUMENT_INVALID,
                "update_mask: only display_name and labels can be updated",
                metadata={"field": "update_mask", "unknown": str(len(unknown))},
            )
        wanted = request.subject
        subject = await self._gallery.update_subject(
            _gallery(wanted.gallery_id, "gallery.write"),
            wanted.subject_id,
            display_name=wanted.display_name if "display_name" in paths else None,
            labels=_labels(wanted.labels) if "labels" in paths else None,
            etag=wanted.etag,
        )
        return pb.UpdateSubjectResponse(subject=_subject(subject))

    async def DeleteSubject(
        self, request: pb.DeleteSubjectRequest, context: Context
    ) -> pb.DeleteSubjectResponse:
        gallery_id = _gallery(request.gallery_id, "gallery.write")
        try:
            gone = await self._gallery.delete_subject(gallery_id, request.subject_id)
        finally:
            self._controls.forgotten()
        self._events.forget_subject(gallery_id, request.subject_id)
        return pb.DeleteSubjectResponse(templates_deleted=gone.templates, receipt=gone.receipt)

    # -- templates -----------------------------------------------------------------------

    async def ListTemplates(
        self, request: pb.ListTemplatesRequest, context: Context
    ) -> pb.ListTemplatesResponse:
        templates = await self._gallery.list_templates(
            _gallery(request.gallery_id, "gallery.read"), request.subject_id
        )
        return pb.ListTemplatesResponse(templates=[_template(t) for t in templates])

    async def DeleteTemplate(
        self, request: pb.DeleteTemplateRequest, context: Context
    ) -> pb.DeleteTemplateResponse:
        try:
            await self._gallery.delete_template(
                _gallery(request.gallery_id, "gallery.write"), request.template_id
            )
        finally:
            self._controls.forgotten()
        return pb.DeleteTemplateResponse()

    async def EnrollFace(
        self, request: pb.EnrollFaceRequest, context: Context
    ) -> pb.EnrollFaceResponse:
        remaining = context.time_remaining()
        gallery_id = _gallery(request.gallery_id, "enroll")
        judges = self._pipeline.thresholds
        may_reassign = gate.caller().may("reassign", gallery=gallery_id)
        plan = Plan(
            liveness=request.require_live,
            gallery_id="" if may_reassign else gallery_id,
            max_faces=self._config.limits.max_faces,
            want_vectors=True,
            want_chips=self._config.gallery.keep_chips,
        )
        enrolled = await enrolment.enroll(
            self._gallery,
            enrolment.Request(
                gallery_id=gallery_id,
                subject_id=request.subject_id,
                picture=convert.picture(request.picture, self._config),
                request_id=request.request_id,
                create_subject=request.create_subject,
                display_name=request.display_name,
                allow_multiple_faces=request.allow_multiple_faces,
                require_live=request.require_live,
                may_reassign=may_reassign,
            ),
            analyse=lambda picture: self._read(picture, plan, remaining, judges),
            thresholds=judges.at(gallery_id),
        )
        return pb.EnrollFaceResponse(
            subject=_subject(enrolled.subject),
            template=_template(enrolled.template),
            face=convert.face(
                enrolled.face, convert.View.of(gate.caller(), "identify", gallery_id)
            ),
            warnings=[
                pb.EnrollWarning.Value(f"ENROLL_WARNING_{w.value}") for w in enrolled.warnings
            ],
        )

    # -- corrections -------------------------------------------------------------------------

    async def CorrectIdentity(
        self, request: pb.CorrectIdentityRequest, context: Context
    ) -> pb.CorrectIdentityResponse:
        caller, remaining = gate.caller(), context.time_remaining()
        said = request.WhichOneof("correction")
        if said is None or (said == "is_not" and not request.is_not):
            raise convert.invalid("say is_not = true, or which subject_id it is", field="is_not")
        event = await self._events.find(request.sequence)
        if event is None:
            raise event_not_found()
        gallery_id, track = event.gallery_id, event.track
        caller.require("correct", gallery=gallery_id, source=event.source_id)
        for_confirmers(event, caller)
        if track is None or not track.picture:
            raise picture_not_found()
        photo = await self._kept.get(track.picture)
        picture = Picture(Encoding.JPEG, photo.around)
        may_reassign = caller.may("reassign", gallery=gallery_id)
        plan = Plan(
            liveness=False,
            gallery_id="" if may_reassign or said == "is_not" else gallery_id,
            max_faces=self._config.limits.max_faces,
            want_vectors=True,
            want_chips=self._config.gallery.keep_chips,
        )

        async def analyse(shown: Picture) -> Reading:
            return await self._read(shown, plan, remaining, judges)

        judges = self._pipeline.thresholds
        thresholds = judges.at(gallery_id)
        if said == "is_not":
            named = track.identity.subject_id
            if not named:
                raise correction.nobody_named()
            done = await correction.is_not(
                self._gallery, gallery_id, named, picture, analyse=analyse, thresholds=thresholds
            )
        else:
            asked = enrolment.Request(
                gallery_id=gallery_id,
                subject_id=request.subject_id,
                picture=picture,
                create_subject=request.create_subject,
                display_name=request.display_name,
                allow_multiple_faces=True,
                may_reassign=may_reassign,
                correction=Correction.IS,
            )
            done = await correction.is_he(
                self._gallery, asked, analyse=analyse, thresholds=thresholds
            )
            # Whom it shows is known now: the picture is the subject's, and goes with it.
            await self._kept.give(track.picture, gallery_id, request.subject_id)
        return pb.CorrectIdentityResponse(correction=_correction(done.template))

    async def UndoCorrection(
        self, request: pb.UndoCorrectionRequest, context: Context
    ) -> pb.UndoCorrectionResponse:
        gallery_id = _gallery(request.gallery_id, "correct")
        await self._gallery.delete_template(gallery_id, request.correction_id, undo=True)
        return pb.UndoCorrectionResponse()

    async def ListCorrections(
        self, request: pb.ListCorrectionsRequest, context: Context
    ) -> pb.ListCorrectionsResponse:
        gallery_id = _gallery(request.gallery_id, "correct")
        listed = await self._gallery.list_templates(
            gallery_id, request.subject_id, corrections=True
        )
        return pb.ListCorrectionsResponse(corrections=[_correction(one) for one in listed])

    # -- 1:1 and 1:N -----------------------------------------------------------------------

    async def VerifyFace(
        self, request: pb.VerifyFaceRequest, context: Context
    ) -> pb.VerifyFaceResponse:
        caller = gate.caller()
        gallery_id = _gallery(request.gallery_id, "identify")
        plan, remaining = self._plan("", want_vectors=True), context.time_remaining()
        judges = self._pipeline.thresholds
        thresholds = judges.at(gallery_id)
        asked = convert.naming(request, caller, gallery_id, None)
        if asked is not None:
            thresholds = asked.verifying(thresholds)
        picture = convert.picture(request.picture, self._config)
        self._look_up(gallery_id)
        self._trail.note(Action.LOOKED_UP, gallery=gallery_id, subject=request.subject_id)
        found = await verification.verify(
            self._gallery,
            gallery_id,
            request.subject_id,
            picture,
            analyse=lambda picture: self._read(picture, plan, remaining, judges),
            thresholds=thresholds,
            liveness=plan.liveness and not caller.may("waive-liveness", gallery=gallery_id),
        )
        if found.verified:
            self._pictures.seen(gallery_id, request.subject_id)
        view = convert.View.of(caller, "identify", gallery_id)
        return pb.VerifyFaceResponse(
            verified=found.verified,
            similarity=view.similarity(found.similarity, found.face.identity),
            threshold=found.threshold,
            face=convert.face(found.face, view),
        )

    async def IdentifyFace(
        self, request: pb.IdentifyFaceRequest, context: Context
    ) -> pb.IdentifyFaceResponse:
        caller = gate.caller()
        gallery_id = _gallery(request.gallery_id, "identify")
        if request.max_candidates > limits.MAX_CANDIDATES:
            raise convert.invalid(
                f"max_candidates must be 0-{limits.MAX_CANDIDATES}", field="max_candidates"
            )
        picture = convert.picture(request.picture, self._config)
        plan = self._plan(
            gallery_id,
            request.max_candidates,
            naming=convert.naming(request, caller, gallery_id, None),
        )
        self._pipeline.check_naming(plan)
        per_minute = self._look_up(gallery_id)
        reading = await self._pictures.analyse(picture, plan, remaining_s=context.time_remaining())
        if Stage.RECOGNIZER in reading.result.missing_stages:
            raise verification.unanswered()
        faces = reading.result.faces
        self._trail.note(Action.LOOKED_UP, gallery=gallery_id, faces=len(faces))
        view = convert.View.of(caller, "identify", gallery_id)
        return pb.IdentifyFaceResponse(
            faces=convert.faces(faces, view.bounded(self._quotas, caller, per_minute, credit=1))
        )

    def _look_up(self, gallery_id: str) -> float:
        """Counts a look-up of the caller's; how many it has a minute."""
        caller = gate.caller()
        per_minute = caller.lookups_per_minute("identify", gallery=gallery_id)
        self._quotas.look_up(caller, per_minute)
        return per_minute

    def _plan(
        self,
        gallery_id: str,
        max_candidates: int = 0,
        *,
        want_vectors: bool = False,
        naming: Asked | None = None,
    ) -> Plan:
        """Raises ``FacelaneError(POOL_UNAVAILABLE)`` on a server that recognises nobody."""
        if Stage.RECOGNIZER not in self._pipeline.pools:
            raise FacelaneError(
                Reason.POOL_UNAVAILABLE,
                "this server runs without a recogniser, so nobody can be identified; switch it on "
                "in [pools.recognizer]",
                metadata={"stage": Stage.RECOGNIZER.value},
            )
        return Plan(
            gallery_id=gallery_id,
            max_faces=self._config.limits.max_faces,
            max_candidates=max_candidates,
            liveness=Stage.LIVENESS in self._pipeline.pools,
            want_vectors=want_vectors,
            naming=naming,
        )

    def _recogniser(self) -> str:
        return self._controls.model_ids().get(Stage.RECOGNIZER, "")

    async def _read(
        self, picture: Picture, plan: Plan, remaining_s: float | None, judges: Thresholds
    ) -> Reading:
        """The faces of a picture, and the model that their vectors are of. ``judges``: what the
        caller is going to compare its scores with."""
        model_id = self._recogniser()
        reading = await self._pictures.analyse(picture, plan, remaining_s=remaining_s)
        if self._pipeline.thresholds != judges:
            raise model_changing()  # they are of another model by now
        if self._recogniser() != model_id or reading.model_id not in (model_id, ""):
            raise model_changing()  # the vectors may be of either
        return replace(reading, model_id=model_id)


def _gallery(gallery_id: str, verb: Verb) -> str:
    return convert.gallery(gallery_id, gate.caller(), verb)


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy; of more than can be kept, so many that they are refused."""
    return dict(itertools.islice(labels.items(), limits.MAX_LABELS + 1))


def _subject(subject: Subject) -> face_pb2.Subject:
    return face_pb2.Subject(
        subject_id=subject.subject_id,
        gallery_id=subject.gallery_id,
        display_name=subject.display_name,
        labels=dict(subject.labels),
        create_time=convert.timestamp(subject.created_ns),
        update_time=convert.timestamp(subject.updated_ns),
        template_count=subject.template_count,
        etag=subject.etag,
    )


def _correction(template: Template) -> pb.Correction:
    return pb.Correction(
        correction_id=template.template_id,
        subject_id=template.subject_id,
        is_not=template.correction is Correction.NOT,
        create_time=convert.timestamp(template.created_ns),
    )


def _template(template: Template) -> face_pb2.Template:
    return face_pb2.Template(
        template_id=template.template_id,
        subject_id=template.subject_id,
        model_id=template.model_id,
        ood_score=template.ood_score,
        quality=template.quality,
        create_time=convert.timestamp(template.created_ns),
    )
