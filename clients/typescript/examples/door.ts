/**
 * A door that opens for people who are known and live, on a server's events alone.
 *
 *     node dist/examples/door.js --source front-door [--latest 2] -- /usr/local/bin/open-door
 *
 * Prints a line of JSON for every opening, `{"open": who, ...}`, and runs the command after `--` with the subject's id
 * as its last argument; `{"closed": why, ...}` says why it stays closed for a face, or for everybody. The server is
 * FACELANE_TARGET, the key FACELANE_TOKEN. Copy it and make it yours: `Door` is the rule, the rest the loop around it.
 *
 * It fails closed. Nothing opens without an event that says so, and each track opens once: not for a face that is known
 * but not LIVE, not for one of another source, not while the server cannot be reached, and not afterwards for what
 * happened meanwhile.
 */

import { timestampDate } from "@bufbuild/protobuf/wkt";
import { execFile } from "node:child_process";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { Client, Decision, EventKind, FacelaneError, LivenessVerdict, type Event } from "../src/index.js";

const KINDS = [EventKind.SUBJECT_SEEN, EventKind.TRACK_STARTED, EventKind.TRACK_UPDATED];
/** Tracks for which the door has opened, or said why not; each once for each name or reason. */
const REMEMBERED = 1000;

const UNNAMED: Partial<Record<Decision, string>> = {
  [Decision.UNKNOWN]: "UNKNOWN",
  [Decision.AMBIGUOUS]: "UNKNOWN",
  [Decision.REJECTED_OOD]: "NOT_TRUSTED",
};

/** Whom to open for. */
export class Door {
  private readonly opened = new Set<string>();
  private readonly told = new Set<string>();

  /** `latest`: an event older than so many seconds opens nothing: who stood there may be gone. */
  constructor(private readonly sourceId: string, private readonly latest = 2) {}

  /** The subject to open for; "" = stay closed. */
  hears(event: Event, now: Date): string {
    if (!event.track || this.whyNot(event, now)) return "";
    const subject = event.identity?.subjectId ?? "";
    return first(this.opened, `${event.track.globalTrackId} ${subject}`) ? subject : "";
  }

  /** Why an event opens nothing; "" = it does, or did. */
  whyNot(event: Event, now: Date): string {
    if (event.sourceId !== this.sourceId || !event.track || !event.eventTime) return "NOT_HERE";
    const decision = event.identity?.decision ?? Decision.UNSPECIFIED;
    const verdict = event.liveness?.verdict ?? LivenessVerdict.UNSPECIFIED;
    if (verdict === LivenessVerdict.SPOOF) return "SPOOF_SUSPECTED";
    if (decision !== Decision.MATCH || !event.identity?.subjectId) return UNNAMED[decision] ?? "NOT_SURE_YET";
    if (verdict !== LivenessVerdict.LIVE) return "NOT_KNOWN_TO_BE_LIVE";
    // Old, or from the future: who stood there may be gone, or the clocks of the server and of this machine disagree.
    const age = (now.getTime() - timestampDate(event.eventTime).getTime()) / 1000;
    return Math.abs(age) <= this.latest ? "" : "EVENT_TOO_OLD";
  }

  /** What `whyNot` says, once a track; "" = nothing that has to be told. */
  explains(event: Event, now: Date): string {
    const why = this.whyNot(event, now);
    if (!event.track || why === "" || why === "NOT_HERE") return "";
    return first(this.told, `${event.track.globalTrackId} ${why}`) ? why : "";
  }
}

/** Whether it was not known before; now it is. */
function first(known: Set<string>, what: string): boolean {
  if (known.has(what)) return false;
  known.add(what);
  const [oldest] = known;
  if (known.size > REMEMBERED && oldest !== undefined) known.delete(oldest);
  return true;
}

function tell(what: "open" | "closed", whomOrWhy: string, event?: Event): void {
  const about = event ? { stream: event.streamId, track: Number(event.trackId) } : {};
  console.log(JSON.stringify({ [what]: whomOrWhy, ...about }));
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { source: { type: "string" }, latest: { type: "string", default: "2" } },
  });
  if (!values.source) {
    console.error("usage: door.js --source SOURCE_ID [--latest SECONDS] [-- COMMAND ...]");
    return 2;
  }
  const door = new Door(values.source, Number(values.latest));
  const token = process.env["FACELANE_TOKEN"];
  await using client = new Client(process.env["FACELANE_TARGET"], { timeout: 5, ...(token ? { token } : {}) });
  const end = new AbortController();
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => end.abort());
  while (!end.signal.aborted) {
    try {
      // No resume token, and no reconnecting: what happened while nobody listened opens nothing.
      for await (const { event } of client.watchEvents({ kinds: KINDS, reconnect: false, signal: end.signal })) {
        if (!event) {
          console.log(JSON.stringify({ listening: values.source }));
          continue;
        }
        const now = new Date();
        const subject = door.hears(event, now);
        const why = subject ? "" : door.explains(event, now);
        if (subject) {
          tell("open", subject, event);
          const [command, ...more] = positionals;
          if (command) {
            execFile(command, [...more, subject], { timeout: 5000 }, (error) => {
              if (error) console.error(`the command failed: ${error.message}`);
            });
          }
        } else if (why) {
          tell("closed", why, event);
        }
      }
    } catch (error) {
      if (!(error instanceof FacelaneError)) throw error;
      tell("closed", error.reason);
      console.error(`closed: ${error.message}`);
      if (!error.retryable) return 1;
    }
    await sleep(1000, undefined, { signal: end.signal }).catch(() => undefined);
  }
  return 0;
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) process.exitCode = await main();
