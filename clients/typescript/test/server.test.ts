/** Against a real server: FACELANE_TEST_TARGET, with null models; FACELANE_TEST_PICTURE, a JPEG. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { Client, EventKind, FacelaneError, OverloadPolicy } from "../src/index.js";

const target = process.env["FACELANE_TEST_TARGET"];
const picture = process.env["FACELANE_TEST_PICTURE"];
const skip = target && picture ? false : "needs FACELANE_TEST_TARGET and FACELANE_TEST_PICTURE";
const jpeg = (): Uint8Array => readFileSync(picture ?? "");
const connect = (): Client => new Client(target, { timeout: 60 });

test("a stream gives every frame its outcome, in order", { skip }, async () => {
  await using client = connect();
  const stream = client.analyzeStream({ sourceId: "ts-camera", overloadPolicy: OverloadPolicy.LOSSLESS });
  const limits = (await stream.opened()).limits;
  assert.ok(limits && limits.window > 0);
  const frames = 3 * limits.window;
  const sending = (async () => {
    for (let n = 0; n < frames; n += 1) await stream.send(jpeg(), { streamOffset: n / 25 });
    stream.closeSend();
  })();
  const ids: bigint[] = [];
  for await (const outcome of stream) {
    assert.equal(outcome.outcome.case, "result");
    ids.push(outcome.frameId);
  }
  await sending;
  assert.deepEqual(ids, Array.from({ length: frames }, (_, n) => BigInt(n + 1)));
  assert.equal(stream.counts.results, frames);
});

test("a broken frame is its own error, and the stream goes on", { skip }, async () => {
  await using client = connect();
  const stream = client.analyzeStream({ overloadPolicy: OverloadPolicy.LOSSLESS });
  await stream.send(Uint8Array.of(0xff, 0xd8, 1, 2, 3));
  await stream.send(jpeg());
  stream.closeSend();
  const kinds: unknown[] = [];
  for await (const outcome of stream) kinds.push(outcome.outcome.case);
  assert.deepEqual(kinds, ["error", "result"]);
});

test("a stream that is let go is settled", { skip }, async () => {
  await using client = connect();
  const stream = client.analyzeStream();
  await stream.opened();
  const id = stream.trySend(jpeg());
  assert.equal(id, 1n);
  stream.close();
  let outcomes = 0;
  for await (const _ of stream) outcomes += 1;
  assert.equal(outcomes, 1);
  await assert.rejects(stream.send(jpeg()), { reason: "STREAM_CLOSED" });
});

test("a gallery: enrol, look, list, verify, identify, delete", { skip }, async () => {
  await using client = connect();
  const galleryId = `ts-${process.pid}`;
  const subject = await client.createSubject("ada", { galleryId, displayName: "Ada", labels: { role: "staff" } });
  assert.deepEqual([subject.displayName, subject.labels["role"]], ["Ada", "staff"]);
  const enrolled = await client.enrollFace("ada", jpeg(), { galleryId, requestId: "r-1", skipLiveness: true, allowMultipleFaces: true });
  const again = await client.enrollFace("ada", jpeg(), { galleryId, requestId: "r-1", skipLiveness: true, allowMultipleFaces: true });
  assert.equal(again.template?.templateId, enrolled.template?.templateId);
  assert.equal((await client.listTemplates("ada", galleryId)).length, 1);
  assert.equal((await client.verifyFace("ada", jpeg(), galleryId)).verified, true);
  const faces = await client.identifyFace(jpeg(), { galleryId, maxCandidates: 1 });
  assert.ok(faces.length >= 1);
  for (let n = 0; n < 5; n += 1) await client.createSubject(`s-${n}`, { galleryId });
  const listed: string[] = [];
  for await (const one of client.listSubjects(galleryId, 2)) listed.push(one.subjectId);
  assert.deepEqual(listed.sort(), ["ada", "s-0", "s-1", "s-2", "s-3", "s-4"]);
  assert.equal((await client.deleteSubject("ada", galleryId)).templatesDeleted, 1);
  await assert.rejects(client.getSubject("ada", galleryId), (error: FacelaneError) => error.reason === "SUBJECT_NOT_FOUND");
  for (let n = 0; n < 5; n += 1) await client.deleteSubject(`s-${n}`, galleryId);
});

test("a picture, and what the server is", { skip }, async () => {
  await using client = connect();
  const result = await client.analyzeImage(jpeg(), { skipLiveness: true });
  assert.ok(result.width > 0);
  const info = await client.serverInfo();
  assert.match(info.version, /^\d/);
  await assert.rejects(client.analyzeImage(Uint8Array.of(1, 2, 3)), { reason: "PICTURE_UNSUPPORTED" });
});

test("events are told, and a token goes on behind what it was given with", { skip }, async () => {
  await using client = connect();
  const source = `ts-door-${process.pid}`;
  const watch = client.watchEvents({ kinds: [EventKind.STREAM_OPENED, EventKind.STREAM_CLOSED], sourceIds: [source] });
  const begun = await watch.next();
  assert.ok(!begun.done && begun.value.event === undefined && begun.value.resumeToken);
  const stream = client.analyzeStream({ sourceId: source });
  await stream.opened();
  stream.closeSend();
  for await (const _ of stream);
  const first = await watch.next();
  assert.ok(!first.done);
  assert.equal(first.value.event?.kind, EventKind.STREAM_OPENED);
  await watch.return(undefined);
  const later = client.watchEvents({ resumeToken: first.value.resumeToken, sourceIds: [source] });
  await later.next();
  const second = await later.next();
  assert.ok(!second.done);
  assert.equal(second.value.event?.kind, EventKind.STREAM_CLOSED);
  await later.return(undefined);
});

test("nobody there is an error with a reason", { skip }, async () => {
  await using client = new Client("unix:/nonexistent/facelane.sock", { timeout: 5 });
  await assert.rejects(client.serverInfo(), (error: FacelaneError) => error.retryable && ["UNREACHABLE", "DEADLINE_EXCEEDED"].includes(error.reason));
  const stream = client.analyzeStream({}, { connectTimeout: 1 });
  await assert.rejects(async () => { for await (const _ of stream); }, { reason: "UNREACHABLE" });
});
