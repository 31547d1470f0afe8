"""What a stream, a picture, and the command ask of names, on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.e2e import wire
from tests.running_server import RunningServer
from typer.testing import CliRunner

import facelane
from facelane import aio
from facelane.cli.app import app


def decisions(client: facelane.Client, **options: float) -> set[tuple[str, float | None]]:
    frames = [facelane.Frame(wire.picture(71), stream_offset=k / 10) for k in range(4)]
    outcomes = list(client.analyze(frames, source_id="asks", gallery="asked", **options))  # type: ignore[arg-type]
    assert all(outcome.result for outcome in outcomes)
    return {
        (face.identity.decision.value, face.identity.threshold)
        for outcome in outcomes
        if outcome.result
        for face in outcome.result.faces
    }


def test_a_stream_may_have_surer_names(client: facelane.Client) -> None:
    client.enroll("ada-who-is-asked-for", wire.picture(71), gallery="asked")
    [(decision, usual)] = decisions(client)
    assert decision == "MATCH"
    assert usual is not None
    [(decision, needed)] = decisions(client, match_threshold=0.75)
    assert (decision, needed) == ("MATCH", 0.75), "the very picture that was enrolled"
    other = wire.picture(71, size=(64, 96))
    for threshold in (None, 1.0):
        result = client.analyze_image(other, gallery="asked", match_threshold=threshold)
        [face] = result.faces
        assert face.identity.matched is (
            threshold is None and (face.identity.similarity or 0) >= usual
        )
        assert face.identity.threshold == (threshold or usual)


def test_the_opening_says_what_holds(client: facelane.Client) -> None:
    with client.analyze_stream(match_threshold=0.75) as stream:
        assert (stream.opened.match_threshold, stream.opened.false_naming) == (0.75, None)
        stream.close_send()
    with client.analyze_stream(skip_recognition=True) as stream:
        assert stream.opened.match_threshold is None
        stream.close_send()


def test_a_look_up_may_have_surer_names(client: facelane.Client) -> None:
    client.enroll("eva-who-is-looked-up", wire.picture(75), gallery="looked-up")
    same, other = wire.picture(75), wire.picture(75, size=(64, 96))
    [found] = client.identify(same, gallery="looked-up", match_threshold=0.75)
    assert (found.identity.subject_id, found.identity.threshold) == ("eva-who-is-looked-up", 0.75)
    [found] = client.identify(other, gallery="looked-up", match_threshold=1.0)
    assert (found.identity.decision, found.identity.threshold) == ("UNKNOWN", 1.0)
    whom = "eva-who-is-looked-up"
    # Null models call nobody alive: the decision says whom it passes for.
    answer = client.verify(whom, same, gallery="looked-up", match_threshold=0.75)
    assert (answer.face.identity.decision, answer.threshold) == ("MATCH", 0.75)
    answer = client.verify(whom, other, gallery="looked-up", match_threshold=1.0)
    assert (answer.face.identity.decision, answer.threshold) == ("UNKNOWN", 1.0)
    assert not answer.verified


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"match_threshold": 0.0}, "NAMING_TOO_LOOSE"),
        ({"false_naming": 0.0001}, "NAMING_NOT_MEASURED"),
        ({"match_threshold": 2.0}, "CONFIG_INVALID"),
        ({"false_naming": 0.01, "match_threshold": 0.9}, "CONFIG_INVALID"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(
    client: facelane.Client, server: RunningServer, asked: dict[str, float], reason: str
) -> None:
    with pytest.raises(facelane.FacelaneError) as refused, client.analyze_stream(**asked):  # type: ignore[arg-type]
        pass
    assert refused.value.reason == reason
    assert not refused.value.retryable
    with pytest.raises(facelane.FacelaneError) as refused:
        client.analyze_image(wire.picture(1), **asked)  # type: ignore[arg-type]
    assert refused.value.reason == reason.replace("CONFIG", "ARGUMENT")
    with pytest.raises(facelane.FacelaneError) as refused:
        client.identify(wire.picture(1), **asked)  # type: ignore[arg-type]
    assert refused.value.reason == reason.replace("CONFIG", "ARGUMENT")
    with pytest.raises(facelane.FacelaneError) as refused:
        client.verify("nobody", wire.picture(1), **asked)  # type: ignore[arg-type]
    assert refused.value.reason == reason.replace("CONFIG", "ARGUMENT"), "before who is looked for"

    async def open_one() -> None:
        async with aio.Client(server.target) as waiting, waiting.analyze_stream(**asked):  # type: ignore[arg-type]
            pass

    with pytest.raises(facelane.FacelaneError) as refused:
        asyncio.run(open_one())
    assert refused.value.reason == reason


def test_the_command_asks_too(
    client: facelane.Client, server: RunningServer, tmp_path: Path
) -> None:
    client.enroll("bea-who-is-asked-for", wire.picture(72), gallery="commanded")
    path = tmp_path / "face.jpg"
    path.write_bytes(wire.encoded(seed=72))
    command = ["--target", server.target, "analyze", str(path), "--gallery", "commanded"]
    command += ["--format", "jsonl"]
    done = CliRunner().invoke(app, [*command, "--match-threshold", "0"])
    assert done.exit_code != 0
    assert "loosen-naming" in done.output
    done = CliRunner().invoke(app, [*command, "--match-threshold", "0.99"])
    assert done.exit_code == 0, done.output
    assert '"threshold":0.99' in done.output.replace(" ", "")
    subject = "bea-who-is-asked-for"
    for words in (["identify", str(path)], ["verify", subject, str(path)]):
        command = ["--target", server.target, *words, "--gallery", "commanded", "--format", "jsonl"]
        done = CliRunner().invoke(app, [*command, "--match-threshold", "0"])
        assert "loosen-naming" in done.output
        done = CliRunner().invoke(app, [*command, "--match-threshold", "0.99"])
        assert '"threshold":0.99' in done.output.replace(" ", "")


def test_who_is_enrolled_anew_under_a_name_is_another(client: facelane.Client) -> None:
    """While the track of the one who had it is alive."""
    client.enroll("cleo", wire.picture(73), gallery="anew")
    with client.analyze_stream(gallery="anew", overload="lossless") as stream:
        outcomes = iter(stream)

        def seen(number: int) -> facelane.Face:
            stream.send(wire.picture(73), stream_offset=number / 25)
            outcome = next(outcomes)
            assert outcome.result is not None
            return outcome.result.faces[0]

        first = seen(1)
        assert first.identity.subject_id == "cleo"
        client.delete_subject("cleo", gallery="anew")
        client.enroll("cleo", wire.picture(74), gallery="anew")
        later = [seen(number) for number in range(2, 8)]
        assert all(face.identity.subject_id == "" for face in later)
        assert later[-1].identity.decision == "UNKNOWN"
        assert {face.track_id for face in later} == {first.track_id}
        stream.close_send()
