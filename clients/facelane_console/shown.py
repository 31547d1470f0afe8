"""The SDK's values as the page reads them: plain JSON."""

from __future__ import annotations

from typing import Any

import facelane


def face(value: facelane.Face) -> dict[str, Any]:
    identity = value.identity
    return {
        "track": value.track_id,
        "box": [value.box.x, value.box.y, value.box.width, value.box.height],
        "decision": identity.decision.value,
        "name": identity.subject_id,
        "similarity": identity.similarity,
        "ood": value.ood_score,
        "live": value.liveness.verdict.value,
    }


def picture(value: facelane.StreamPicture) -> dict[str, Any]:
    """What goes before the bytes of a picture."""
    outcome = value.outcome
    told: dict[str, Any] = {
        "encoding": value.picture.encoding.value,
        "key": value.key_frame,
        "skipped": value.skipped,
    }
    if outcome is not None:
        told |= {"id": outcome.frame_id, "age": outcome.age}
        if outcome.result is not None:
            told |= {
                "width": outcome.result.width,
                "height": outcome.result.height,
                "faces": [face(one) for one in outcome.result.faces],
            }
        elif outcome.drop is not None:
            told["drop"] = outcome.drop.reason.value
    return told


def event(value: facelane.Event) -> dict[str, Any]:
    track = value.track
    told: dict[str, Any] = {
        "sequence": value.sequence,
        "kind": value.kind.value,
        "time": None if value.event_time is None else value.event_time.timestamp(),
        "source": value.source_id,
        "gallery": value.gallery,
        "decision": value.identity.decision.value,
        "name": value.identity.subject_id,
        "live": value.liveness.verdict.value,
        "message": value.message,
        "pool": value.pool,
        "rule": "" if value.rule is None else value.rule.name,
        "candidate": value.candidate_subject_id,
    }
    if track is not None:
        seen = track.last_capture_time
        told |= {
            "display_name": track.display_name,
            "ood": track.best_ood_score,
            "similarity": track.best_similarity,
            "looks": track.looks,
            "seconds": track.last_offset - track.first_offset,
            "camera_time": None if seen is None else seen.timestamp(),
            "picture": track.has_picture,
        }
    return told


def subject(value: facelane.Subject) -> dict[str, Any]:
    return {
        "id": value.subject_id,
        "gallery": value.gallery,
        "display_name": value.display_name,
        "labels": dict(value.labels),
        "templates": value.template_count,
    }


def template(value: facelane.Template) -> dict[str, Any]:
    made = value.create_time
    return {
        "id": value.template_id,
        "quality": value.quality,
        "ood": value.ood_score,
        "time": None if made is None else made.timestamp(),
    }


def correction(value: facelane.Correction) -> dict[str, Any]:
    made = value.create_time
    return {
        "id": value.correction_id,
        "subject": value.subject_id,
        "is_not": value.is_not,
        "time": None if made is None else made.timestamp(),
    }


def stream(value: facelane.OpenStream) -> dict[str, Any]:
    return {
        "stream": value.stream_id,
        "source": value.source_id,
        "gallery": value.gallery_id,
        "encoding": None if value.encoding is None else value.encoding.value,
        "fps": value.outcome_fps,
        "results": value.result_fps,
        "age": value.age_p95,
        "tracks": value.tracks,
        "drops": value.drops,
        "received": value.received,
        "watchers": value.watchers,
    }


def system(
    info: facelane.ServerInfo, pools: list[facelane.PoolInfo], health: facelane.HealthStatus
) -> dict[str, Any]:
    return {
        "health": health.value,
        "version": info.version,
        "streams": info.open_streams,
        "draining": info.draining,
        "shards": [
            [shard.shard, shard.state.value, shard.open_streams, shard.restarts, shard.last_loss]
            for shard in info.shards
        ],
        "load": None if info.load is None else info.load.load,
        "degradations": [[d.component, d.cause, d.message] for d in info.degradations],
        "models": [[m.task.value, m.name, m.version] for m in info.models],
        "pools": [
            {
                "name": pool.pool,
                "state": pool.state.value,
                "model": pool.model_id,
                "queued": pool.queued,
                "failed": pool.failed,
                "completed": pool.completed,
                "budget": pool.memory_budget_bytes // (1 << 20),
                "workers": [
                    {
                        "id": worker.worker_id,
                        "state": worker.state.value,
                        "device": worker.device,
                        "restarts": worker.restarts,
                        "last_loss": worker.last_loss,
                        "mib": worker.memory_bytes // (1 << 20),
                    }
                    for worker in pool.workers
                ],
            }
            for pool in pools
        ],
    }
