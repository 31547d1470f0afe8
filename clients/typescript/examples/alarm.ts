/**
 * An alarm panel: what should not be before a camera, on a server's events alone.
 *
 *     node dist/examples/alarm.js --source vault [--zone safe]
 *
 * Prints a line of JSON, `{"alarm": why, ...}`, for a face that is held up as a picture or a mask (SPOOF_SUSPECTED), for
 * one that nobody knows (UNKNOWN_SEEN; with `--zone` ZONE_UNKNOWN of that zone), and for one that hides (FACE_HIDDEN);
 * `{"blind": why}` while it cannot know. The server is FACELANE_TARGET, the key FACELANE_TOKEN. Copy it and make it
 * yours: `rule` decides, the rest is the loop around it.
 *
 * It fails closed: an alarm that hears nothing is itself an alarm. It is told when the server cannot be reached, when
 * events were lost, and when a pool of the server cannot infer.
 */

import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { Client, EventKind, FacelaneError, type Event } from "../src/index.js";

type Told = { alarm: string; stream: string; track: number; zone?: string } | { blind: string };

/** What to tell of an event; `undefined` = nothing. */
export function rule(event: Event, sourceId: string, zone = ""): Told | undefined {
  if (event.kind === EventKind.POOL_CHANGED) return { blind: `${event.pool}: ${event.message}` };
  if (event.sourceId !== sourceId || !event.track) return undefined;
  const of = event.rule?.name ?? "";
  if (event.kind === EventKind.ZONE_UNKNOWN ? of !== zone : zone && event.kind === EventKind.UNKNOWN_SEEN) {
    return undefined;
  }
  const about = { stream: event.streamId, track: Number(event.trackId) };
  return { alarm: EventKind[event.kind], ...about, ...(of ? { zone: of } : {}) };
}

const KINDS = [
  EventKind.SPOOF_SUSPECTED, EventKind.UNKNOWN_SEEN, EventKind.FACE_HIDDEN, EventKind.ZONE_UNKNOWN, EventKind.POOL_CHANGED,
];

const tell = (line: object): void => console.log(JSON.stringify(line));

async function main(): Promise<number> {
  const { values } = parseArgs({ options: { source: { type: "string" }, zone: { type: "string", default: "" } } });
  if (!values.source) {
    console.error("usage: alarm.js --source SOURCE_ID [--zone ZONE]");
    return 2;
  }
  const token = process.env["FACELANE_TOKEN"];
  await using client = new Client(process.env["FACELANE_TARGET"], { timeout: 5, ...(token ? { token } : {}) });
  const end = new AbortController();
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => end.abort());
  let resumeToken = "";
  while (!end.signal.aborted) {
    try {
      const asked = { kinds: KINDS, resumeToken, reconnect: false as const, signal: end.signal };
      for await (const watched of client.watchEvents(asked)) {
        resumeToken = watched.resumeToken;
        const told = watched.event ? rule(watched.event, values.source, values.zone) : { listening: values.source };
        if (told) tell(told);
      }
    } catch (error) {
      if (!(error instanceof FacelaneError)) throw error;
      if (error.reason === "HISTORY_LOST") {
        resumeToken = "";
        tell({ blind: "events were lost" });
      } else {
        tell({ blind: error.reason });
        if (!error.retryable) return 1;
      }
    }
    await sleep(1000, undefined, { signal: end.signal }).catch(() => undefined);
  }
  return 0;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) process.exitCode = await main();
