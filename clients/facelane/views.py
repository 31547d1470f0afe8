"""A look at a stream, by both clients: what is asked, and what the answers mean."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any

import grpc
import grpc.aio

from facelane import calls, convert, ending, types
from facelane.driver import ClientBase
from facelane.errors import ArgumentError, FacelaneError, Reason
from facelane.v1 import event_service_pb2, gallery_service_pb2
from facelane.v1 import view_service_pb2 as pb
from facelane.v1.view_service_pb2_grpc import ViewServiceStub

_ENCODING = {number: encoding for encoding, number in convert._ENCODING.items()}


def list_streams(
    *, source_ids: tuple[str, ...] | list[str] = (), timeout: float | None = None
) -> calls.Call[list[types.OpenStream]]:
    """The streams that are open and may be looked at; of all sources unless some are named."""
    return calls.Call(
        lambda stubs: stubs.view.ListStreams,
        pb.ListStreamsRequest(source_ids=source_ids),
        lambda answer: [_open_stream(s) for s in answer.streams],
        timeout,
    )


def event_picture(sequence: int, *, timeout: float | None = None) -> calls.Call[types.EventPicture]:
    """The picture of an event, by its number, where one is kept (``event.track.has_picture``).

    Raises:
        NotFoundError: there is no such event (EVENT_NOT_FOUND), or no picture of it: none was kept,
            or retention or a deletion has ended it (PICTURE_NOT_FOUND).
        PermissionDeniedError: the key may not view its source and gallery.
    """
    if not 0 <= sequence < 1 << 64:
        raise ArgumentError(Reason.ARGUMENT_INVALID, "sequence: give the number of an event")
    return calls.Call(
        lambda stubs: stubs.events.GetEventPicture,
        event_service_pb2.GetEventPictureRequest(sequence=sequence),
        lambda answer: types.EventPicture(answer.picture_jpeg, answer.chip_jpeg),
        timeout,
    )


def correct_identity(
    sequence: int,
    *,
    is_not: bool = False,
    subject_id: str = "",
    create_subject: bool = False,
    display_name: str = "",
    timeout: float | None = None,
) -> calls.Call[types.Correction]:
    """Says of an event's face, whose picture has to be kept, that it is not whom the event names
    (``is_not``), or which subject it is. ``undo_correction`` takes it back.

    Raises:
        NotFoundError: EVENT_NOT_FOUND, PICTURE_NOT_FOUND, or SUBJECT_NOT_FOUND.
        EnrollmentRefusedError: the picture will not do, as in ``enroll``.
        RefusedError: the face matches another subject (FACE_OF_ANOTHER): say first that it is not.
    """
    if is_not is bool(subject_id):
        raise ArgumentError(Reason.ARGUMENT_INVALID, "give either is_not=True or subject_id")
    request = gallery_service_pb2.CorrectIdentityRequest(
        sequence=sequence, create_subject=create_subject, display_name=display_name
    )
    if is_not:
        request.is_not = True
    else:
        request.subject_id = subject_id
    return calls.Call(
        lambda stubs: stubs.gallery.CorrectIdentity,
        request,
        lambda answer: _correction(answer.correction),
        timeout,
    )


def undo_correction(
    correction_id: str, *, gallery: str = convert.DEFAULT_GALLERY, timeout: float | None = None
) -> calls.Call[None]:
    """Takes a correction back.

    Raises:
        NotFoundError: there is no such correction (TEMPLATE_NOT_FOUND).
    """
    return calls.Call(
        lambda stubs: stubs.gallery.UndoCorrection,
        gallery_service_pb2.UndoCorrectionRequest(gallery_id=gallery, correction_id=correction_id),
        lambda _answer: None,
        timeout,
    )


def list_corrections(
    subject_id: str, *, gallery: str = convert.DEFAULT_GALLERY, timeout: float | None = None
) -> calls.Call[list[types.Correction]]:
    """What was said of a subject's faces and not undone, oldest first."""
    return calls.Call(
        lambda stubs: stubs.gallery.ListCorrections,
        gallery_service_pb2.ListCorrectionsRequest(gallery_id=gallery, subject_id=subject_id),
        lambda answer: [_correction(one) for one in answer.corrections],
        timeout,
    )


def _correction(c: gallery_service_pb2.Correction) -> types.Correction:
    made = convert._moment(c.create_time) if c.HasField("create_time") else None
    return types.Correction(c.correction_id, c.subject_id, c.is_not, made)


def list_events(
    *,
    before: int = 0,
    kinds: Iterable[types.EventKind | str] = (),
    source_ids: Iterable[str] = (),
    gallery_ids: Iterable[str] = (),
    page_size: int = 50,
    timeout: float | None = None,
) -> calls.Call[tuple[list[types.Event], int]]:
    """A page of what has happened, the newest first, and what to give as ``before`` for the next
    one; 0 = nothing older is kept. Events of a page have no resume token."""
    return calls.Call(
        lambda stubs: stubs.events.ListEvents,
        event_service_pb2.ListEventsRequest(
            before_sequence=before,
            kinds=convert.event_kinds(kinds),
            source_ids=source_ids,
            gallery_ids=gallery_ids,
            page_size=convert.count("page_size", page_size),
        ),
        lambda answer: (
            [convert.event(event_service_pb2.WatchEventsResponse(event=e)) for e in answer.events],
            answer.next_before_sequence,
        ),
        timeout,
    )


def _open_stream(s: pb.OpenStream) -> types.OpenStream:
    return types.OpenStream(
        s.stream_id,
        s.source_id,
        s.gallery_id,
        convert._moment(s.open_time) if s.HasField("open_time") else None,
        _ENCODING.get(s.encoding),
        s.outcome_fps,
        s.result_fps,
        convert.seconds(s.age_median),
        convert.seconds(s.age_p95),
        s.tracks,
        s.received,
        s.results,
        s.drops,
        s.errors,
        s.watchers,
    )


def _request(
    source_id: str, stream_id: str, max_fps: float, results_only: bool, key_frames_only: bool
) -> pb.WatchStreamRequest:
    if bool(source_id) is bool(stream_id):
        raise ArgumentError(Reason.ARGUMENT_INVALID, "give either source_id or stream_id")
    if max_fps < 0:
        raise ArgumentError(Reason.ARGUMENT_INVALID, "max_fps: give 0.1-60, or 0 for 15")
    return pb.WatchStreamRequest(
        source_id=source_id,
        stream_id=stream_id,
        max_fps=max_fps,
        results_only=results_only,
        key_frames_only=key_frames_only,
    )


def _picture(response: pb.WatchStreamResponse) -> types.StreamPicture | None:
    """None for what is no picture, or of an encoding that this client does not know."""
    if response.WhichOneof("message") != "picture":
        return None
    p = response.picture
    encoding = _ENCODING.get(p.picture.encoding)
    if encoding is None:
        return None
    return types.StreamPicture(
        types.Picture(
            encoding, p.picture.data, p.picture.width, p.picture.height, p.picture.stride
        ),
        convert._outcome(p.outcome) if p.HasField("outcome") else None,
        p.key_frame,
        p.skipped,
    )


def watch_stream(
    self: Any,
    source_id: str = "",
    *,
    stream_id: str = "",
    max_fps: float = 0.0,
    results_only: bool = False,
    key_frames_only: bool = False,
) -> Generator[types.StreamPicture, None, None]:
    """The pictures of a stream as the server received them, with their outcomes, from now on.

    Ends with the stream; close the generator to end it before. Still pictures come at most
    ``max_fps`` times a second (15 unless given), the newest there is, with ``results_only`` only
    those that were analysed. Video comes whole, from its last key frame on, or its key frames
    alone. Whoever takes them too slowly misses some.

    Raises (while iterating):
        NotFoundError: no such stream is open, or it is private (STREAM_NOT_FOUND).
        PermissionDeniedError: the key is not for this source.
    """
    client: ClientBase[Any] = self
    request = _request(source_id, stream_id, max_fps, results_only, key_frames_only)
    again = True
    while True:
        client._check_open()
        shown = self._metadata()
        channel = client._channels.take(grpc)
        view = self._stubs.view if channel is None else ViewServiceStub(channel)
        answers = ending.keep(ending.Answers(view.WatchStream(request, metadata=shown)))
        try:
            for response in answers:
                again = False
                if (picture := _picture(response)) is not None:
                    yield picture
            return
        except grpc.RpcError as failed:
            error = client._endpoint.failure(failed)
            if not (again and client._renewed(error, shown)):
                raise error from None
            again = False
        finally:
            answers.close()
            if client._channels.leave(channel):
                channel.close()


async def watch_stream_async(
    self: Any,
    source_id: str = "",
    *,
    stream_id: str = "",
    max_fps: float = 0.0,
    results_only: bool = False,
    key_frames_only: bool = False,
) -> AsyncGenerator[types.StreamPicture, None]:
    """As ``facelane.Client.watch_stream``. Close the generator (``contextlib.aclosing``) when you
    leave it early."""
    client: ClientBase[Any] = self
    request = _request(source_id, stream_id, max_fps, results_only, key_frames_only)
    again = True
    while True:
        client._check_open()
        shown = await self._metadata()
        channel = client._channels.take(grpc.aio)
        view: Any = self._stubs.view if channel is None else ViewServiceStub(channel)
        call = view.WatchStream(request, metadata=shown)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                again = False
                if (picture := _picture(response)) is not None:
                    yield picture
            return
        except grpc.RpcError as failed:
            error: FacelaneError = client._endpoint.failure(failed)
            if not (again and client._renewed(error, shown)):
                raise error from None
            again = False
        finally:
            call.cancel()
            if client._channels.leave(channel):
                await channel.close()
