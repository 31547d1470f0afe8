/**
 * Streams the pictures of a folder and prints each outcome as a line of JSON.
 *
 *     node dist/examples/frames.js FOLDER [FPS]
 *
 * The server is FACELANE_TARGET, the key FACELANE_TOKEN. A lost stream comes back; frames that were under way are told
 * as lost. With FACELANE_LOOP the folder is streamed again and again until SIGTERM.
 */

import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Client, Decision, errorInfo, LivenessVerdict, OverloadPolicy, StreamUpdateKind } from "../src/index.js";

const [folder = ".", fps = "25"] = process.argv.slice(2);
const names = readdirSync(folder).filter((name) => /\.jpe?g$/.test(name)).sort();
const token = process.env["FACELANE_TOKEN"];
await using client = new Client(process.env["FACELANE_TARGET"], token ? { token } : {});
const stream = client.analyzeStream(
  { sourceId: "frames", overloadPolicy: OverloadPolicy.LOSSLESS },
  {
    reconnect: { initialDelay: 0.1, maxDelay: 1 },
    onUpdate: (update) => console.error(JSON.stringify({ update: StreamUpdateKind[update.kind] })),
  },
);
let stopped = !process.env["FACELANE_LOOP"];
process.on("SIGTERM", () => (stopped = true));

async function send(): Promise<void> {
  let number = 0;
  do {
    for (const name of names) {
      await stream.send(readFileSync(join(folder, name)), { streamOffset: number / Number(fps) });
      number += 1;
    }
  } while (!stopped);
  stream.closeSend();
}

const sending = send();
for await (const { frameId, outcome } of stream) {
  const line: Record<string, unknown> = { frame: Number(frameId), kind: outcome.case };
  if (outcome.case === "result") {
    line["faces"] = outcome.value.faces.map((face) => ({
      track: Number(face.trackId),
      box: [face.box?.x, face.box?.y, face.box?.width, face.box?.height],
      decision: Decision[face.identity?.decision ?? 0],
      subject: face.identity?.subjectId ?? "",
      live: LivenessVerdict[face.liveness?.verdict ?? 0],
    }));
  } else if (outcome.case === "error") {
    line["reason"] = errorInfo(outcome.value)?.reason ?? "";
  }
  console.log(JSON.stringify(line));
}
await sending;
console.log(JSON.stringify({ counts: stream.counts }));
