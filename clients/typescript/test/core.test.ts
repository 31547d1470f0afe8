/** The stream's rules, without a connection. */

import { create } from "@bufbuild/protobuf";
import assert from "node:assert/strict";
import { test } from "node:test";
import { StreamCore } from "../src/core.js";
import { errorInfo, FacelaneError } from "../src/errors.js";
import { AnalyzeStreamResponseSchema, StreamUpdateKind, type FrameOutcome } from "../src/gen/facelane/v1/analysis_service_pb.js";

const opened = (window = 2) => create(AnalyzeStreamResponseSchema, { message: { case: "opened", value: { limits: { window, maxFrameBytes: 100n } } } });
const result = (frameId: bigint) => create(AnalyzeStreamResponseSchema, { message: { case: "outcome", value: { frameId, outcome: { case: "result", value: {} } } } });
const summary = (received: bigint, results: bigint) => create(AnalyzeStreamResponseSchema, { message: { case: "summary", value: { received, results } } });
const lost = () => new FacelaneError("UNREACHABLE", "gone", { grpc_status: "UNAVAILABLE" }, true, 14);

function reasonOf(outcome: FrameOutcome | undefined): string {
  assert.equal(outcome?.outcome.case, "error");
  return errorInfo(outcome.outcome.value)?.reason ?? "";
}

test("a window holds, outcomes come in order, a summary ends it", () => {
  const core = new StreamCore(0);
  assert.equal(core.obstacle(), "NOT_CONNECTED");
  core.receive(opened(), 1);
  core.submit(1, 1);
  core.submit(1, 1.5);
  assert.equal(core.obstacle(), "WINDOW_FULL");
  core.receive(result(1n), 2);
  assert.equal(core.obstacle(), undefined);
  assert.throws(() => core.receive(result(7n), 2), { reason: "PROTOCOL_VIOLATION" });
  core.receive(result(2n), 2);
  core.closeSend();
  assert.equal(core.halfClose(3), true);
  assert.equal(core.halfClose(3), false);
  core.receive(summary(2n, 2n), 3);
  core.disconnected(undefined, 3);
  assert.deepEqual([core.take()?.frameId, core.take()?.frameId, core.take()], [1n, 2n, undefined]);
  assert.equal(core.exhausted, true);
  assert.equal(core.error, undefined);
});

test("unread outcomes hold back the sender", () => {
  const core = new StreamCore(0, { buffer: 2 });
  core.receive(opened(2), 0);
  for (const id of [1n, 2n]) {
    core.submit(1, 0);
    core.receive(result(id), 0);
  }
  assert.equal(core.obstacle(), "OUTCOMES_UNREAD");
  core.take();
  assert.equal(core.obstacle(), undefined);
});

test("what is in flight when the connection breaks is settled, and the stream comes back", () => {
  const core = new StreamCore(0, { reconnect: { initialDelay: 1, jitter: 0 } });
  core.receive(opened(), 0);
  core.submit(1, 0);
  core.submit(1, 0);
  core.receive(result(1n), 0);
  core.disconnected(lost(), 5);
  assert.deepEqual([core.phase, core.retryAt], ["backoff", 6]);
  assert.equal(core.take()?.frameId, 1n);
  assert.equal(reasonOf(core.take()), "CONNECTION_LOST");
  core.connecting(6);
  core.receive(opened(), 6);
  assert.equal(core.submit(1, 6).frameId, 3n);
  core.receive(result(3n), 6);
  assert.deepEqual({ ...core.counts }, { submitted: 3, results: 2, drops: 0, errors: 1, lost: 1, connections: 2 });
});

test("waits grow, and tries have an end", () => {
  const core = new StreamCore(0, { reconnect: { initialDelay: 1, maxDelay: 3, jitter: 0, maxAttempts: 3 } });
  const waits: number[] = [];
  for (let now = 0; core.phase !== "ended"; now += 10) {
    core.disconnected(lost(), now);
    if (core.phase === "backoff") {
      waits.push(core.retryAt - now);
      core.connecting(now);
    }
  }
  assert.deepEqual(waits, [1, 2, 3]);
  assert.equal(core.error?.reason, "UNREACHABLE");
});

test("without reconnect a break ends it, with the error; a refusal ends it always", () => {
  const once = new StreamCore(0);
  once.receive(opened(), 0);
  once.disconnected(lost(), 1);
  assert.equal(once.error?.reason, "CONNECTION_LOST");
  assert.throws(() => once.obstacle(), { reason: "CONNECTION_LOST" });
  const refused = new StreamCore(0, { reconnect: {} });
  refused.disconnected(new FacelaneError("PERMISSION_DENIED", "no"), 1);
  assert.equal(refused.phase, "ended");
});

test("a server that says nothing is given up, one that goes is left", () => {
  const core = new StreamCore(0, { connectTimeout: 2, stallTimeout: 3, reconnect: {} });
  assert.equal(core.overdue(1.9), undefined);
  assert.equal(core.overdue(2)?.reason, "UNREACHABLE");
  core.receive(opened(), 2);
  assert.equal(core.overdue(100), undefined);
  core.submit(1, 100);
  assert.equal(core.overdue(103)?.reason, "CONNECTION_LOST");
  core.receive(create(AnalyzeStreamResponseSchema, { message: { case: "update", value: { kind: StreamUpdateKind.DRAINING } } }), 101);
  assert.equal(core.obstacle(), "NOT_CONNECTED");
  assert.equal(core.halfClose(101), true);
});

test("frames that cannot be are refused before they are sent", () => {
  const core = new StreamCore(0);
  core.receive(opened(9), 0);
  assert.throws(() => core.submit(101, 0), { reason: "PICTURE_TOO_LARGE" });
  core.submit(1, 0, { frameId: 5n, offset: 2 });
  assert.throws(() => core.submit(1, 0, { frameId: 5n }), { reason: "FRAME_ID_NOT_INCREASING" });
  assert.throws(() => core.submit(1, 0, { offset: 1 }), { reason: "ARGUMENT_INVALID" });
  assert.equal(core.counts.submitted, 1);
});

test("a frame that cannot be written was not taken", () => {
  const core = new StreamCore(0);
  core.receive(opened(), 0);
  assert.throws(() => core.submit(1, 0, {}, () => { throw new RangeError("no date"); }), RangeError);
  for (const offset of [NaN, Infinity]) assert.throws(() => core.submit(1, 0, { offset }), { reason: "ARGUMENT_INVALID" });
  assert.equal(core.counts.submitted, 0);
  assert.equal(core.submit(1, 0).frameId, 1n);
});

test("a refused token is asked for once more, and at once", () => {
  const core = new StreamCore(0);
  const refused = new FacelaneError("UNAUTHENTICATED", "no", {}, false, 16);
  core.disconnected(refused, 1, true);
  assert.deepEqual([core.phase, core.retryAt], ["backoff", 1]);
  core.connecting(1);
  core.disconnected(refused, 2, true);
  assert.equal(core.phase, "ended");
  assert.equal(core.error, refused);
});
