/** The client against a server of this process that behaves as it is told. */

import { create, toBinary } from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { Client, FacelaneError } from "../src/index.js";
import { AnalyzeStreamResponseSchema } from "../src/gen/facelane/v1/analysis_service_pb.js";
import { WatchEventsResponseSchema } from "../src/gen/facelane/v1/event_service_pb.js";

type Watch = grpc.ServerWritableStream<Buffer, Buffer>;
type Stream = grpc.ServerDuplexStream<Buffer, Buffer>;

const plain = {
  requestSerialize: (bytes: Buffer): Buffer => bytes, requestDeserialize: (bytes: Buffer): Buffer => bytes,
  responseSerialize: (bytes: Buffer): Buffer => bytes, responseDeserialize: (bytes: Buffer): Buffer => bytes,
  responseStream: true,
};

async function serving(
  does: { watch?: (call: Watch) => void; stream?: (call: Stream) => void }, tried: (target: string) => Promise<void>,
  options: grpc.ServerOptions = {},
): Promise<void> {
  const server = new grpc.Server(options);
  server.addService(
    {
      watch: { ...plain, path: "/facelane.v1.EventService/WatchEvents", requestStream: false },
      stream: { ...plain, path: "/facelane.v1.AnalysisService/AnalyzeStream", requestStream: true },
    },
    { watch: does.watch ?? (() => undefined), stream: does.stream ?? (() => undefined) },
  );
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, at) => (error ? reject(error) : resolve(at)));
  });
  try {
    await tried(`127.0.0.1:${port}`);
  } finally {
    server.forceShutdown();
  }
}

const told = (resumeToken: string, sequence?: bigint): Buffer => Buffer.from(toBinary(
  WatchEventsResponseSchema, create(WatchEventsResponseSchema, { resumeToken, ...(sequence ? { event: { sequence } } : {}) }),
));
const opened = (): Buffer => Buffer.from(toBinary(
  AnalyzeStreamResponseSchema, create(AnalyzeStreamResponseSchema, { message: { case: "opened", value: { limits: { window: 2 } } } }),
));
const broken = (call: Watch | Stream, code: grpc.status): void => void call.emit("error", { code, details: "told so" });

test("a watch goes on where it was, whatever its connection breaks with", async () => {
  const codes = [grpc.status.INTERNAL, grpc.status.UNKNOWN, grpc.status.CANCELLED, grpc.status.UNAVAILABLE];
  let calls = 0;
  await serving({
    watch: (call) => {
      const code = codes[calls];
      call.write(told(`t${(calls += 1)}`, BigInt(calls)));
      if (code !== undefined) setImmediate(() => broken(call, code));
    },
  }, async (target) => {
    await using client = new Client(target);
    const seen: (bigint | undefined)[] = [];
    for await (const { event } of client.watchEvents({ reconnect: { initialDelay: 0.01 } })) {
      seen.push(event?.sequence);
      if (seen.length === 5) break;
    }
    assert.deepEqual(seen, [1n, 2n, 3n, 4n, 5n]);
  });
});

test("what begins and breaks at once is given up after so many tries", async () => {
  let calls = 0;
  await serving({
    watch: (call) => {
      calls += 1;
      call.write(told("t"));
      setImmediate(() => broken(call, grpc.status.UNAVAILABLE));
    },
  }, async (target) => {
    await using client = new Client(target);
    const watching = (async () => {
      for await (const _ of client.watchEvents({ reconnect: { initialDelay: 0.01, maxAttempts: 3 } }));
    })();
    await assert.rejects(watching, (error: FacelaneError) => error.retryable);
    assert.equal(calls, 4);
  });
});

test("a refused token is asked for again, by a watch and by a stream", async () => {
  const refuse = (call: Watch | Stream): boolean => {
    if (call.metadata.get("authorization")[0] === "Bearer new") return false;
    broken(call, grpc.status.UNAUTHENTICATED);
    return true;
  };
  await serving({
    watch: (call) => void (refuse(call) || call.write(told("t", 1n))),
    stream: (call) => void (refuse(call) || call.write(opened())),
  }, async (target) => {
    for (const use of ["watch", "stream"]) {
      let asked = 0;
      await using client = new Client(target, { token: () => (asked++ ? "new" : "old") });
      if (use === "watch") {
        for await (const { event } of client.watchEvents({ reconnect: false })) {
          assert.equal(event?.sequence, 1n);
          break;
        }
      } else {
        assert.equal((await client.analyzeStream().opened()).limits?.window, 2);
      }
      assert.equal(asked, 2);
    }
  });
});

test("a function that gives no token is asked again; without reconnect its failure is told", async () => {
  await serving({ watch: (call) => void call.write(told("t", 1n)) }, async (target) => {
    let asked = 0;
    const token = (): string => {
      asked += 1;
      if (asked < 3) throw new Error("the secret is s3cr3t");
      return "new";
    };
    await using client = new Client(target, { token });
    const watching = client.watchEvents({ reconnect: false });
    await assert.rejects(watching.next(), (error: FacelaneError) => {
      assert.ok(error instanceof FacelaneError && error.retryable && !error.message.includes("s3cr3t"));
      return true;
    });
    for await (const { event } of client.watchEvents({ reconnect: { initialDelay: 0.01 } })) {
      assert.equal(event?.sequence, 1n);
      break;
    }
  });
});

test("a server that never begins a watch is not waited for", async () => {
  await serving({}, async (target) => {
    await using client = new Client(target, { timeout: 0.2 });
    await assert.rejects(client.watchEvents({ reconnect: false }).next(), { reason: "DEADLINE_EXCEEDED" });
  });
});

test("more streams and watches than a connection takes go by several, which are left again", async () => {
  const peers = new Map<string, number>();
  const counted = (call: Watch | Stream): void => {
    const peer = call.getPeer();
    peers.set(peer, (peers.get(peer) ?? 0) + 1);
    call.on("cancelled", () => peers.set(peer, (peers.get(peer) ?? 0) - 1));
  };
  await serving({
    watch: (call) => (counted(call), void call.write(told("t"))),
    stream: (call) => (counted(call), void call.write(opened())),
  }, async (target) => {
    await using client = new Client(target);
    const streams = Array.from({ length: 120 }, () => client.analyzeStream());
    const watches = Array.from({ length: 10 }, () => client.watchEvents());
    await Promise.all([...streams.map((one) => one.opened()), ...watches.map((one) => one.next())]);
    assert.deepEqual([...peers.values()].sort((a, b) => b - a), [64, 64, 2]);
    for (const one of streams) one.close();
    for (const one of watches) await one.return(undefined);
    while ([...peers.values()].some(Boolean)) await sleep(5);
    const [own] = peers.keys();
    await client.analyzeStream().opened();
    await client.watchEvents().next();
    assert.deepEqual([...peers].filter(([, calls]) => calls).map(([peer]) => peer), [own]);
  }, { "grpc.max_concurrent_streams": 100 });
});

test("a call that cannot be made holds no place of its connection", async () => {
  const client = new Client("127.0.0.1:9");
  const failing = (): never => {
    throw new Error("no call");
  };
  for (let tries = 0; tries < 200; tries += 1) assert.throws(() => client["long"](failing), /no call/);
  assert.deepEqual([...client["connections"]["calls"].values()], [0]);
  client.close();
});

test("closing the client ends its streams and its watches", async () => {
  await serving({
    watch: (call) => void call.write(told("t")),
    stream: (call) => void call.write(opened()),
  }, async (target) => {
    const client = new Client(target);
    const stream = client.analyzeStream({}, { reconnect: {} });
    await stream.opened();
    const watching = client.watchEvents();
    await watching.next();
    const next = watching.next();
    client.close();
    assert.equal((await next).done, true);
    for await (const _ of stream) assert.fail("nothing was sent");
    assert.throws(() => client.analyzeStream(), { reason: "STREAM_CLOSED" });
  });
});

test("an aborted watch ends, while it waits for its token and between two tries too", async () => {
  const end = new AbortController();
  const waiting = new Client("127.0.0.1:9", { token: async () => (await sleep(50), "t") });
  const first = waiting.watchEvents({ signal: end.signal }).next();
  end.abort();
  assert.equal((await first).done, true);
  const between = new AbortController();
  const away = new Client("127.0.0.1:9", { timeout: 1 });
  const next = away.watchEvents({ signal: between.signal, reconnect: { initialDelay: 3600, maxDelay: 3600 } }).next();
  setTimeout(() => between.abort(), 500);
  assert.equal((await next).done, true);
  waiting.close();
  away.close();
});
