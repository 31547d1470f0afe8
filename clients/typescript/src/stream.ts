/** A stream of frames: send as fast as you like, read one outcome for each. */

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, timestampFromDate, type Timestamp } from "@bufbuild/protobuf/wkt";
import type { ClientDuplexStream, ServiceError } from "@grpc/grpc-js";
import { StreamCore, type CoreOptions, type Counts } from "./core.js";
import { FacelaneError, fromRpc } from "./errors.js";
import {
  AnalyzeStreamRequestSchema, FrameSchema, StreamConfigSchema,
  type AnalyzeStreamRequest, type AnalyzeStreamResponse, type FrameOutcome, type StreamOpened, type StreamUpdate,
} from "./gen/facelane/v1/analysis_service_pb.js";
import { pictureOf, type PictureInput } from "./pictures.js";

export type AnalysisCall = ClientDuplexStream<AnalyzeStreamRequest, AnalyzeStreamResponse>;

export interface FrameOptions {
  /** Must increase; by itself 1, 2, 3, ... */
  frameId?: bigint;
  /** Media time in seconds; by itself the time since the stream opened. */
  streamOffset?: number;
  captureTime?: Date;
  /** W3C Trace Context of the frame's span, `00-<trace id>-<span id>-01`: the server's spans are made its children. */
  traceparent?: string;
  /** Seconds that `send` waits for a place; by itself as long as it takes. */
  timeout?: number;
}

export interface StreamOptions extends CoreOptions {
  onUpdate?: (update: StreamUpdate) => void;
}

/** What the stream asks of its client. */
export interface Hooks {
  /** Whether a refused token may be followed by another. */
  refused?: (error: FacelaneError) => boolean;
  /** The stream is over. */
  ended?: () => void;
}

const now = (): number => performance.now() / 1000;
const TICK_MS = 100;

/** Iterate over it for the outcomes, in order, one for each frame; `await using` or `close()` lets go of it. */
export class AnalysisStream implements AsyncIterable<FrameOutcome>, AsyncDisposable {
  private readonly core: StreamCore;
  private readonly waiters = new Set<() => void>();
  private readonly timer: NodeJS.Timeout;
  private call: AnalysisCall | undefined;
  private dials = 0;

  constructor(
    private readonly connect: () => Promise<AnalysisCall>,
    private readonly config: MessageInitShape<typeof StreamConfigSchema>,
    private readonly options: StreamOptions = {},
    private readonly hooks: Hooks = {},
  ) {
    const { onUpdate: _, ...core } = options;
    this.core = new StreamCore(now(), core);
    this.timer = setInterval(() => this.tick(), TICK_MS);
    this.dial();
  }

  /** Waits for a place in the window, then sends; gives the frame's id. */
  async send(picture: PictureInput, options: FrameOptions = {}): Promise<bigint> {
    const until = options.timeout === undefined ? Infinity : now() + options.timeout;
    for (let obstacle = this.core.obstacle(); obstacle; obstacle = this.core.obstacle()) {
      if (now() >= until) {
        throw new FacelaneError(obstacle, `waited ${options.timeout} s for a place: ${ADVICE[obstacle]}`, {}, true);
      }
      await this.changed();
    }
    return this.put(picture, options);
  }

  /** Sends if there is a place now; else gives `undefined`, and the frame is not taken. */
  trySend(picture: PictureInput, options: Omit<FrameOptions, "timeout"> = {}): bigint | undefined {
    return this.core.obstacle() ? undefined : this.put(picture, options);
  }

  private put(given: PictureInput, options: FrameOptions): bigint {
    const picture = pictureOf(given);
    const wanted = {
      ...(options.frameId === undefined ? {} : { frameId: options.frameId }),
      ...(options.streamOffset === undefined ? {} : { offset: options.streamOffset }),
    };
    const build = (frameId: bigint, offset: number): AnalyzeStreamRequest => create(AnalyzeStreamRequestSchema, {
      message: {
        case: "frame",
        value: create(FrameSchema, {
          frameId, picture, streamOffset: durationFromMs(Math.round(offset * 1000)),
          ...(options.captureTime ? { captureTime: moment(options.captureTime) } : {}),
          ...(options.traceparent ? { traceparent: options.traceparent } : {}),
        }),
      },
    });
    let message = undefined as AnalyzeStreamRequest | undefined;
    const { frameId } = this.core.submit(picture.data.length, now(), wanted, (id, offset) => (message = build(id, offset)));
    if (message) this.call?.write(message);
    return frameId;
  }

  /** What the server said of this stream when it opened; waits for it. */
  async opened(): Promise<StreamOpened> {
    while (!this.core.opened) {
      if (this.core.phase === "ended") throw this.core.error ?? new FacelaneError("STREAM_CLOSED", "the stream has ended");
      await this.changed();
    }
    return this.core.opened;
  }

  /** No more frames; outcomes still come. */
  closeSend(): void {
    this.core.closeSend();
    this.tick();
  }

  /** Frames so far; of the whole stream once it has ended. */
  get counts(): Readonly<Counts> {
    return this.core.counts;
  }

  async *[Symbol.asyncIterator](): AsyncIterator<FrameOutcome> {
    for (;;) {
      const outcome = this.core.take();
      if (outcome) {
        this.wake();
        yield outcome;
      } else if (this.core.exhausted) {
        if (this.core.error) throw this.core.error;
        return;
      } else {
        await this.changed();
      }
    }
  }

  /** Lets go: frames in flight are settled as CANCELLED. */
  close(): void {
    this.core.abort();
    this.call?.cancel();
    this.finish();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  private dial(): void {
    this.core.connecting(now());
    const dialled = (this.dials += 1);
    this.connect().then(
      (call) => {
        if (this.core.phase !== "connecting" || dialled !== this.dials) {
          // It was waited for too long, and another is under way or nobody wants one.
          call.on("error", () => undefined);
          call.cancel();
          return;
        }
        this.call = call;
        call.on("data", (message: AnalyzeStreamResponse) => this.receive(call, message));
        // grpc-js tells the error at once, and the end behind what was received before.
        let failed: FacelaneError | undefined;
        call.on("error", (error: ServiceError) => (failed = fromRpc(error)));
        call.on("end", () => this.lost(call, failed));
        call.write(create(AnalyzeStreamRequestSchema, {
          message: { case: "config", value: create(StreamConfigSchema, this.config) },
        }));
      },
      (error: unknown) => {
        if (dialled !== this.dials || this.core.phase !== "connecting") return;
        this.over(error instanceof FacelaneError ? error : new FacelaneError("INTERNAL", String(error)));
      },
    );
  }

  private receive(call: AnalysisCall, message: AnalyzeStreamResponse): void {
    if (call !== this.call) return;
    let update: StreamUpdate | undefined;
    try {
      update = this.core.receive(message, now());
    } catch (error) {
      this.lost(call, error as FacelaneError);
      return;
    }
    this.tick();
    if (update) this.options.onUpdate?.(update);
  }

  private lost(call: AnalysisCall, error: FacelaneError | undefined): void {
    if (call !== this.call) return;
    this.call = undefined;
    call.cancel();
    this.over(error);
  }

  private over(error: FacelaneError | undefined): void {
    this.core.disconnected(error, now(), error !== undefined && (this.hooks.refused?.(error) ?? false));
    if (this.core.phase === "ended") this.finish();
    this.wake();
  }

  private tick(): void {
    if (this.core.halfClose(now())) this.call?.end();
    const overdue = this.core.overdue(now());
    if (overdue && this.call) this.lost(this.call, overdue);
    else if (overdue && this.core.phase === "connecting") this.over(overdue);
    if (this.core.phase === "backoff" && now() >= this.core.retryAt) this.dial();
    if (this.core.phase === "ended") this.finish();
    this.wake();
  }

  private finish(): void {
    clearInterval(this.timer);
    this.hooks.ended?.();
    this.wake();
  }

  private changed(): Promise<void> {
    return new Promise((resolve) => this.waiters.add(resolve));
  }

  private wake(): void {
    const woken = [...this.waiters];
    this.waiters.clear();
    for (const one of woken) one();
  }
}

function moment(date: Date): Timestamp {
  if (Number.isNaN(date.getTime())) throw new FacelaneError("ARGUMENT_INVALID", "captureTime is no date");
  return timestampFromDate(date);
}

const ADVICE = {
  NOT_CONNECTED: "the stream is not connected; it tries again by itself",
  WINDOW_FULL: "the server has not answered the frames in flight; or drop frames with trySend",
  OUTCOMES_UNREAD: "outcomes lie unread: iterate over the stream beside",
} as const;
