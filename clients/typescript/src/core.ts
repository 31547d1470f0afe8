/**
 * One stream as a state machine, without sockets, timers or promises.
 *
 * What holds at every moment, whatever the server does: every frame that was submitted gets exactly one outcome, in
 * increasing frame id; at most `window` frames are without an outcome, and at most `buffer` without one or unread.
 * Frames in flight when a connection breaks are settled with CONNECTION_LOST.
 */

import { create } from "@bufbuild/protobuf";
import { anyPack, durationFromMs } from "@bufbuild/protobuf/wkt";
import { asLost, FacelaneError } from "./errors.js";
import {
  FrameOutcomeSchema, StreamUpdateKind,
  type AnalyzeStreamResponse, type FrameOutcome, type StreamOpened, type StreamSummary, type StreamUpdate,
} from "./gen/facelane/v1/analysis_service_pb.js";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { StatusSchema } from "./gen/google/rpc/status_pb.js";

/** How a lost stream comes back; delays in seconds. */
export interface Reconnect {
  /** Tries in a row without an outcome that end the stream; 0 = never give up. */
  maxAttempts?: number;
  initialDelay?: number;
  maxDelay?: number;
  multiplier?: number;
  /** A share, 0 to 1, so that many cameras do not come back at once. */
  jitter?: number;
}

export type Phase = "connecting" | "open" | "finishing" | "backoff" | "ended";

export type Obstacle = "NOT_CONNECTED" | "WINDOW_FULL" | "OUTCOMES_UNREAD";

/** Frames of the whole stream, over all connections; `lost` are among the errors. */
export interface Counts {
  submitted: number;
  results: number;
  drops: number;
  errors: number;
  lost: number;
  connections: number;
}

export interface CoreOptions {
  reconnect?: Reconnect | undefined;
  buffer?: number;
  stallTimeout?: number;
  connectTimeout?: number;
  random?: () => number;
}

interface InFlight {
  frameId: bigint;
  offset: number;
  sentAt: number;
}

/** Seconds after which a connection that breaks was one. */
export const STEADY = 1;

/** `now` is always the driver's monotonic clock in seconds. */
export class StreamCore {
  phase: Phase = "connecting";
  opened: StreamOpened | undefined;
  error: FacelaneError | undefined;
  retryAt = 0;
  readonly counts: Counts = { submitted: 0, results: 0, drops: 0, errors: 0, lost: 0, connections: 0 };

  private readonly inFlight: InFlight[] = [];
  private readonly inbox: FrameOutcome[] = [];
  private readonly options: Required<Omit<CoreOptions, "reconnect">> & { reconnect: Required<Reconnect> | undefined };
  private window = 0;
  private closing = false;
  private leaving = false;
  private summarised = false;
  private since: number;
  private progressAt: number;
  private openedAt: number;
  private epoch: number | undefined;
  private attempts = 0;
  private haste = 0;
  private renewed = false;
  private lastId = 0n;
  private lastOffset = 0;
  private here = [0, 0, 0];

  constructor(now: number, options: CoreOptions = {}) {
    const { reconnect, ...rest } = options;
    this.options = {
      buffer: 1024, stallTimeout: 30, connectTimeout: 10, random: Math.random, ...rest,
      reconnect: reconnect && {
        maxAttempts: 0, initialDelay: 0.2, maxDelay: 10, multiplier: 2, jitter: 0.2, ...reconnect,
      },
    };
    this.since = this.progressAt = this.openedAt = now;
  }

  /** Why a frame cannot be submitted now; throws when none ever can again. */
  obstacle(): Obstacle | undefined {
    if (this.phase === "open" && !this.closing && !this.leaving) {
      if (this.inFlight.length >= this.window) return "WINDOW_FULL";
      return this.inFlight.length + this.inbox.length >= this.options.buffer ? "OUTCOMES_UNREAD" : undefined;
    }
    if (this.error) throw this.error;
    if (this.closing || this.phase === "ended") {
      throw new FacelaneError("STREAM_CLOSED", "the stream has ended: open another with analyzeStream");
    }
    return "NOT_CONNECTED";
  }

  /**
   * Takes a frame; call only without an obstacle. Gives its id and its media time in seconds. Where `build`, which is
   * given them, or a check throws, the frame was not taken.
   */
  submit(
    size: number, now: number, given: { frameId?: bigint; offset?: number } = {},
    build: (frameId: bigint, offset: number) => void = () => undefined,
  ): { frameId: bigint; offset: number } {
    const limit = Number(this.opened?.limits?.maxFrameBytes ?? 0n);
    if (limit && size > limit) {
      throw new FacelaneError("PICTURE_TOO_LARGE", `a frame of ${size} bytes: the server takes ${limit}`);
    }
    const frameId = given.frameId ?? this.lastId + 1n;
    if (frameId <= this.lastId || frameId >= 1n << 64n) {
      throw new FacelaneError("FRAME_ID_NOT_INCREASING", `frame id ${frameId} after ${this.lastId}: ids must increase`);
    }
    const offset = given.offset ?? Math.max(now - (this.epoch ?? now), this.lastOffset);
    if (!(offset >= this.lastOffset && offset < Infinity)) {
      throw new FacelaneError("ARGUMENT_INVALID", `media time ${offset} after ${this.lastOffset}: it must not go back`);
    }
    build(frameId, offset);
    this.inFlight.push({ frameId, offset, sentAt: now });
    this.lastId = frameId;
    this.lastOffset = offset;
    this.counts.submitted += 1;
    return { frameId, offset };
  }

  /** No more frames; outcomes still come. */
  closeSend(): void {
    this.closing = true;
    if (this.phase === "backoff") this.end(undefined);
  }

  /** Whether the driver should half-close this connection; it is asked until it is told once. */
  halfClose(now: number): boolean {
    if (this.phase !== "open" || !(this.closing || this.leaving)) return false;
    this.phase = "finishing";
    this.since = now;
    return true;
  }

  /** Takes a message of the server; throws where it broke the rules, after which `disconnected` must be called. */
  receive(message: AnalyzeStreamResponse, now: number): StreamUpdate | undefined {
    const { message: body } = message;
    if (body.case === "opened") this.open(body.value, now);
    else if (body.case === "outcome") this.settle(body.value, now);
    else if (body.case === "summary") this.summarise(body.value);
    else if (body.case === "update") {
      if (body.value.kind === StreamUpdateKind.DRAINING && this.options.reconnect) this.leaving = true;
      return body.value;
    }
    return undefined;
  }

  private open(message: StreamOpened, now: number): void {
    if (this.phase !== "connecting") throw violation("it opened the stream twice");
    this.phase = "open";
    this.opened = message;
    this.window = message.limits?.window ?? 0;
    this.options.buffer = Math.max(this.options.buffer, this.window);
    this.since = this.progressAt = this.openedAt = now;
    this.leaving = this.summarised = this.renewed = false;
    this.here = [0, 0, 0];
    this.counts.connections += 1;
    this.epoch ??= now;
  }

  private settle(outcome: FrameOutcome, now: number): void {
    if (this.phase !== "open" && this.phase !== "finishing") {
      throw violation("it gave an outcome before it opened the stream");
    }
    const due = this.inFlight[0];
    if (due?.frameId !== outcome.frameId) {
      throw violation(`it gave the outcome of frame ${outcome.frameId} where ${due?.frameId ?? "none"} was due`);
    }
    this.inFlight.shift();
    this.progressAt = now;
    this.attempts = 0;
    const kind = outcome.outcome.case === "result" ? 0 : outcome.outcome.case === "drop" ? 1 : 2;
    this.here[kind] = (this.here[kind] ?? 0) + 1;
    this.deliver(outcome);
  }

  private deliver(outcome: FrameOutcome): void {
    const kind = outcome.outcome.case === "result" ? "results" : outcome.outcome.case === "drop" ? "drops" : "errors";
    this.counts[kind] += 1;
    this.inbox.push(outcome);
  }

  private summarise(summary: StreamSummary): void {
    const said = [summary.results, summary.drops, summary.errors].map(Number);
    if (said.some((count, n) => count !== this.here[n]) || Number(summary.received) !== said.reduce((a, b) => a + b)) {
      throw violation(`it counted ${said} results, drops and errors; ${this.here} arrived here`);
    }
    this.summarised = true;
  }

  /** The next outcome, if one has arrived. */
  take(): FrameOutcome | undefined {
    return this.inbox.shift();
  }

  /** Whether no outcome lies here and none will come. */
  get exhausted(): boolean {
    return this.phase === "ended" && this.inbox.length === 0;
  }

  connecting(now: number): void {
    this.phase = "connecting";
    this.since = now;
  }

  /** The error with which the driver must end a call that does not get on. */
  overdue(now: number): FacelaneError | undefined {
    if (this.phase === "connecting") {
      if (now < this.since + this.options.connectTimeout) return undefined;
      return new FacelaneError("UNREACHABLE", `the server did not open the stream within ${this.options.connectTimeout} s`);
    }
    const oldest = this.inFlight[0];
    const from = oldest ? Math.max(this.progressAt, oldest.sentAt)
      : this.phase === "finishing" ? Math.max(this.progressAt, this.since) : Infinity;
    if (now < from + this.options.stallTimeout) return undefined;
    return new FacelaneError("CONNECTION_LOST", `no outcome for ${this.options.stallTimeout} s with ${this.inFlight.length} frames in flight`);
  }

  /**
   * The call is over. Afterwards the phase is `ended`, or `backoff` and a new call is due at `retryAt`. `renewed`: the
   * token was refused, and there may be another, which is tried once and at once.
   */
  disconnected(error: FacelaneError | undefined, now: number, renewed = false): void {
    if (this.phase === "ended") return;
    const wasOpen = this.phase === "open" || this.phase === "finishing";
    const settled = this.summarised && this.inFlight.length === 0;
    if (!error && !this.summarised) {
      error = new FacelaneError("CONNECTION_LOST", "the server ended the stream without a summary");
    } else if (error && wasOpen) {
      error = asLost(error);
    }
    this.lose("CONNECTION_LOST");
    const { reconnect } = this.options;
    if (this.closing && (settled || !error || (reconnect && error.retryable))) {
      this.end(undefined);
      return;
    }
    if (renewed && !this.renewed && (reconnect || !wasOpen)) {
      this.renewed = true;
      this.phase = "backoff";
      this.retryAt = now;
      return;
    }
    if (!reconnect || (error && !error.retryable)) {
      this.end(error);
      return;
    }
    if (wasOpen && this.attempts === 0 && now - this.openedAt >= STEADY) this.haste = 0;
    this.attempts += 1;
    if (reconnect.maxAttempts && this.attempts > reconnect.maxAttempts) {
      this.end(error);
      return;
    }
    this.haste += 1;
    const grown = Math.min(reconnect.maxDelay, reconnect.initialDelay * reconnect.multiplier ** Math.min(this.haste - 1, 64));
    this.phase = "backoff";
    this.retryAt = now + grown * (1 + reconnect.jitter * (2 * this.options.random() - 1));
  }

  /** The user lets go: frames in flight are settled as CANCELLED. */
  abort(): void {
    if (this.phase === "ended") return;
    this.lose("CANCELLED");
    this.closing = true;
    this.end(undefined);
  }

  private lose(reason: "CONNECTION_LOST" | "CANCELLED"): void {
    const message = reason === "CANCELLED" ? "the stream was closed before the outcome came"
      : "the connection broke before the outcome came: send the picture again if it still matters";
    for (const frame of this.inFlight.splice(0)) {
      if (reason === "CONNECTION_LOST") this.counts.lost += 1;
      const info = create(ErrorInfoSchema, { reason, domain: "facelane" });
      this.deliver(create(FrameOutcomeSchema, {
        frameId: frame.frameId,
        streamOffset: durationFromMs(Math.round(frame.offset * 1000)),
        outcome: { case: "error", value: create(StatusSchema, { code: 14, message, details: [anyPack(ErrorInfoSchema, info)] }) },
      }));
    }
  }

  private end(error: FacelaneError | undefined): void {
    this.phase = "ended";
    this.error = error;
  }
}

function violation(what: string): FacelaneError {
  return new FacelaneError("PROTOCOL_VIOLATION", `the server broke the stream's rules: ${what}`);
}
