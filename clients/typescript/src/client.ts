/** A client of a server, for everything: one connection, and more of them for many streams. Methods throw `FacelaneError`. */

import { create, fromBinary, toBinary, type DescMessage, type DescMethodServerStreaming, type DescMethodUnary, type MessageInitShape, type MessageShape } from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import { randomUUID } from "node:crypto";
import type { EventEmitter } from "node:events";
import { accessSync, constants, readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { Connections } from "./connections.js";
import { STEADY, type Reconnect } from "./core.js";
import { asLost, fromRpc, FacelaneError } from "./errors.js";
import { AnalysisService, type AnalysisOptionsSchema, type AnalyzeStreamRequest, type AnalyzeStreamResponse, type StreamConfigSchema } from "./gen/facelane/v1/analysis_service_pb.js";
import { EventService, type Event, type EventKind, type WatchEventsResponse } from "./gen/facelane/v1/event_service_pb.js";
import type { Face, FrameResult, Subject, Template } from "./gen/facelane/v1/face_pb.js";
import { GalleryService, type EnrollFaceRequestSchema, type EnrollFaceResponse, type VerifyFaceResponse } from "./gen/facelane/v1/gallery_service_pb.js";
import { ServerService, type GetServerInfoResponse } from "./gen/facelane/v1/server_service_pb.js";
import { pictureOf, type PictureInput } from "./pictures.js";
import { AnalysisStream, type StreamOptions } from "./stream.js";

export interface Tls {
  /** Files, PEM. Without `caFile` the system's authorities. */
  caFile?: string;
  certFile?: string;
  keyFile?: string;
  /** The name in the server's certificate, where it is not that of the target. */
  serverName?: string;
}

export interface ClientOptions {
  /** An access token, or a function that gives the present one; it is asked again when the server refuses. */
  token?: string | (() => string | Promise<string>);
  tls?: Tls | boolean;
  /** Seconds of one call. */
  timeout?: number;
}

export interface WatchOptions {
  /** Goes on behind this event's; empty: what happens from now on. */
  resumeToken?: string;
  kinds?: EventKind[];
  sourceIds?: string[];
  galleryIds?: string[];
  /** `false`: the first break ends the watch. */
  reconnect?: Reconnect | false;
  signal?: AbortSignal;
}

/** How sure names must be, beside what the server asks for; one of them. */
export interface NamingOptions {
  /** The share of strangers that may be named, in (0, 1). */
  falseNaming?: number;
  /** The least cosine of a match, in [0, 1]. */
  matchThreshold?: number;
}

/** `event` is absent in the first: the watch has begun, at this token. */
export interface Watched {
  event: Event | undefined;
  resumeToken: string;
}

const MAX_MESSAGE_BYTES = 64 << 20;
const SEVERAL = JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] });

/** Where a server listens of which nothing else is said. */
export function defaultTarget(): string {
  if (process.env["FACELANE_TARGET"]) return process.env["FACELANE_TARGET"];
  const installed = "/run/facelane/grpc.sock";
  try {
    accessSync(installed, constants.W_OK);
    return `unix:${installed}`;
  } catch {
    const own = process.env["XDG_RUNTIME_DIR"];
    return own ? `unix:${own}/facelane/grpc.sock` : `unix:/tmp/facelane-${process.getuid?.() ?? 0}/grpc.sock`;
  }
}

/** Whether what goes there stays on this machine. */
function isLocal(target: string): boolean {
  return target.startsWith("unix:") || /^(?:dns:\/*|ipv4:|ipv6:)?(?:localhost|127\.\d+\.\d+\.\d+|\[?::1\]?)(?::\d+)?$/.test(target);
}

export class Client implements AsyncDisposable {
  private readonly connections: Connections;
  private readonly timeout: number;
  private held: string | undefined;
  /** What ends with the client: streams and watches. */
  private readonly open = new Set<() => void>();
  private closed = false;

  constructor(readonly target: string = defaultTarget(), private readonly options: ClientOptions = {}) {
    this.timeout = options.timeout ?? 10;
    const tls = options.tls === true ? {} : options.tls || undefined;
    if (options.token && !tls && !isLocal(target)) {
      process.emitWarning("the token travels in clear text to another machine: give tls", "InsecureTokenWarning");
    }
    const read = (path: string | undefined): Buffer | null => (path === undefined ? null : readFileSync(path));
    const credentials = tls
      ? grpc.credentials.createSsl(read(tls.caFile), read(tls.keyFile), read(tls.certFile))
      : grpc.credentials.createInsecure();
    const connection = (): grpc.Client => new grpc.Client(target, credentials, {
      "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
      "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
      "grpc.keepalive_time_ms": 20_000,
      "grpc.keepalive_timeout_ms": 10_000,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 2_000,
      "grpc.use_local_subchannel_pool": 1,
      "grpc.primary_user_agent": "facelane-typescript",
      ...(target.startsWith("unix:") ? { "grpc.default_authority": "localhost" } : { "grpc.service_config": SEVERAL }),
      ...(isLocal(target) ? { "grpc.enable_http_proxy": 0 } : {}),
      ...(tls?.serverName ? { "grpc.ssl_target_name_override": tls.serverName } : {}),
    });
    this.connections = new Connections(connection(), connection);
  }

  /** Opens a stream: one camera, one recording. */
  analyzeStream(config: MessageInitShape<typeof StreamConfigSchema> = {}, options: StreamOptions = {}): AnalysisStream {
    this.checkOpen();
    const close = (): void => stream.close();
    const hooks = { refused: (error: FacelaneError) => this.refused(error), ended: () => this.open.delete(close) };
    const stream = new AnalysisStream(
      async () => this.bidi(AnalysisService.method.analyzeStream, await this.metadata()), config, options, hooks,
    );
    this.open.add(close);
    return stream;
  }

  /** One picture. */
  async analyzeImage(picture: PictureInput, options: MessageInitShape<typeof AnalysisOptionsSchema> = {}): Promise<FrameResult> {
    const answer = await this.unary(AnalysisService.method.analyzeImage, { picture: pictureOf(picture), options });
    if (!answer.result) throw new FacelaneError("PROTOCOL_VIOLATION", "the server gave no result");
    return answer.result;
  }

  /** Learns a face for a subject; a second time with the same `requestId` changes nothing. */
  async enrollFace(
    subjectId: string, picture: PictureInput,
    more: Omit<MessageInitShape<typeof EnrollFaceRequestSchema>, "subjectId" | "picture" | "$typeName"> = {},
  ): Promise<EnrollFaceResponse> {
    const request = { ...more, requestId: more.requestId || randomUUID(), subjectId, picture: pictureOf(picture) };
    return this.unary(GalleryService.method.enrollFace, request);
  }

  /** Whether the face is that subject's. */
  async verifyFace(subjectId: string, picture: PictureInput, galleryId = "", naming: NamingOptions = {}): Promise<VerifyFaceResponse> {
    return this.unary(GalleryService.method.verifyFace, { ...naming, galleryId, subjectId, picture: pictureOf(picture) });
  }

  /** Who is in the picture. */
  async identifyFace(picture: PictureInput, more: { galleryId?: string; maxCandidates?: number } & NamingOptions = {}): Promise<Face[]> {
    return (await this.unary(GalleryService.method.identifyFace, { ...more, picture: pictureOf(picture) })).faces;
  }

  async createSubject(subjectId: string, more: { galleryId?: string; displayName?: string; labels?: Record<string, string> } = {}): Promise<Subject> {
    return required((await this.unary(GalleryService.method.createSubject, { ...more, subjectId })).subject);
  }

  async getSubject(subjectId: string, galleryId = ""): Promise<Subject> {
    return required((await this.unary(GalleryService.method.getSubject, { galleryId, subjectId })).subject);
  }

  /** Every subject of a gallery, page by page. */
  async *listSubjects(galleryId = "", pageSize = 0): AsyncGenerator<Subject, void, undefined> {
    for (let pageToken = ""; ; ) {
      const page = await this.unary(GalleryService.method.listSubjects, { galleryId, pageSize, pageToken });
      yield* page.subjects;
      if (!page.nextPageToken) return;
      pageToken = page.nextPageToken;
    }
  }

  /** Deletes a subject with everything of it; no server names it once this has returned. Gives the receipt. */
  async deleteSubject(subjectId: string, galleryId = ""): Promise<{ templatesDeleted: number; receipt: string }> {
    return this.unary(GalleryService.method.deleteSubject, { galleryId, subjectId });
  }

  async listTemplates(subjectId: string, galleryId = ""): Promise<Template[]> {
    return (await this.unary(GalleryService.method.listTemplates, { galleryId, subjectId })).templates;
  }

  async deleteTemplate(templateId: string, galleryId = ""): Promise<void> {
    await this.unary(GalleryService.method.deleteTemplate, { galleryId, templateId });
  }

  async serverInfo(): Promise<GetServerInfoResponse> {
    return this.unary(ServerService.method.getServerInfo, {});
  }

  /** Events as they happen, over breaks of the connection; keep the token of what you have dealt with. */
  async *watchEvents(options: WatchOptions = {}): AsyncGenerator<Watched, void, undefined> {
    this.checkOpen();
    const end = new AbortController();
    const stop = (): void => end.abort();
    options.signal?.addEventListener("abort", stop);
    this.open.add(stop);
    if (options.signal?.aborted) stop();
    try {
      yield* this.watch(options, end.signal);
    } finally {
      options.signal?.removeEventListener("abort", stop);
      this.open.delete(stop);
    }
  }

  private async *watch(options: WatchOptions, end: AbortSignal): AsyncGenerator<Watched, void, undefined> {
    const policy = options.reconnect === false ? undefined
      : { maxAttempts: 0, initialDelay: 0.2, maxDelay: 10, multiplier: 2, jitter: 0.2, ...options.reconnect };
    const { kinds = [], sourceIds = [], galleryIds = [] } = options;
    let resumeToken = options.resumeToken ?? "";
    let attempts = 0;
    let renewed = false;
    while (!end.aborted) {
      const calledAt = performance.now();
      let failed = new FacelaneError("CONNECTION_LOST", "the server ended the watch");
      let begun = false;
      let late: NodeJS.Timeout | undefined;
      let call: grpc.ClientReadableStream<WatchEventsResponse> | undefined;
      const cancel = (): void => call?.cancel();
      end.addEventListener("abort", cancel);
      try {
        const metadata = await this.metadata();
        if (end.aborted) return;
        call = this.serverStream(EventService.method.watchEvents, { resumeToken, kinds, sourceIds, galleryIds }, metadata);
        // Events may take as long as they like; the first response says that the watch has begun.
        late = setTimeout(cancel, 1000 * this.timeout);
        for await (const message of call as AsyncIterable<WatchEventsResponse>) {
          clearTimeout(late);
          begun = true;
          renewed = false;
          if (message.event) attempts = 0;
          resumeToken = message.resumeToken || resumeToken;
          yield { event: message.event, resumeToken };
        }
      } catch (error) {
        if (error instanceof FacelaneError) failed = error;
        else if (isOfRpc(error)) failed = begun ? asLost(fromRpc(error)) : fromRpc(error);
        else throw error;
        if (!begun && call && failed.reason === "CANCELLED") {
          failed = new FacelaneError("DEADLINE_EXCEEDED", `the server did not begin the watch within ${this.timeout} s`);
        }
      } finally {
        clearTimeout(late);
        end.removeEventListener("abort", cancel);
        call?.on("error", () => undefined);
        call?.cancel();
      }
      if (end.aborted) return;
      if (!renewed && (policy || !begun) && this.refused(failed)) {
        renewed = true;
        continue;
      }
      if (begun && performance.now() - calledAt >= 1000 * STEADY) attempts = 0;
      attempts += 1;
      if (!policy || !failed.retryable || (policy.maxAttempts && attempts > policy.maxAttempts)) throw failed;
      const wait = Math.min(policy.maxDelay, policy.initialDelay * policy.multiplier ** Math.min(attempts - 1, 64));
      const spread = 1 + policy.jitter * (2 * Math.random() - 1);
      await sleep(1000 * wait * spread, undefined, { signal: end }).catch(() => undefined);
    }
  }

  /** Ends the connections; streams and watches that are open end with it. */
  close(): void {
    this.closed = true;
    for (const end of [...this.open]) end();
    this.connections.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  private async metadata(): Promise<grpc.Metadata> {
    const metadata = new grpc.Metadata();
    const { token } = this.options;
    if (token !== undefined) {
      this.held ??= (typeof token === "string" ? token : await asked(token)).trim();
      if (!/^[!-~]*$/.test(this.held)) {
        throw new FacelaneError("ARGUMENT_INVALID", "the token holds spaces or characters outside of ASCII: give the key alone");
      }
      if (this.held) metadata.set("authorization", `Bearer ${this.held}`);
    }
    return metadata;
  }

  /** Whether a call was refused for its token, and there may be another by now. */
  private refused(error: FacelaneError): boolean {
    if (error.code !== grpc.status.UNAUTHENTICATED || typeof this.options.token !== "function") return false;
    this.held = undefined;
    return true;
  }

  private checkOpen(): void {
    if (this.closed) throw new FacelaneError("STREAM_CLOSED", "the client was closed: make another");
  }

  private async unary<I extends DescMessage, O extends DescMessage>(method: DescMethodUnary<I, O>, request: MessageInitShape<I>): Promise<MessageShape<O>> {
    try {
      return await this.once(method, request);
    } catch (error) {
      // The token may have been exchanged for another.
      if (!(error instanceof FacelaneError) || !this.refused(error)) throw error;
      return this.once(method, request);
    }
  }

  private async once<I extends DescMessage, O extends DescMessage>(method: DescMethodUnary<I, O>, request: MessageInitShape<I>): Promise<MessageShape<O>> {
    this.checkOpen();
    const metadata = await this.metadata();
    const deadline = new Date(Date.now() + 1000 * this.timeout);
    return new Promise((resolve, reject) => {
      this.connections.own.makeUnaryRequest(
        pathOf(method), encode(method.input), decode(method.output), create(method.input, request), metadata, { deadline },
        (error, answer) => (error || !answer ? reject(error ? fromRpc(error) : new FacelaneError("INTERNAL", "no answer")) : resolve(answer)),
      );
    });
  }

  private bidi(method: typeof AnalysisService.method.analyzeStream, metadata: grpc.Metadata): grpc.ClientDuplexStream<AnalyzeStreamRequest, AnalyzeStreamResponse> {
    return this.long((rpc) => rpc.makeBidiStreamRequest(pathOf(method), encode(method.input), decode(method.output), metadata));
  }

  private serverStream<I extends DescMessage, O extends DescMessage>(method: DescMethodServerStreaming<I, O>, request: MessageInitShape<I>, metadata: grpc.Metadata): grpc.ClientReadableStream<MessageShape<O>> {
    return this.long((rpc) => rpc.makeServerStreamRequest(pathOf(method), encode(method.input), decode(method.output), create(method.input, request), metadata));
  }

  /** A call that lasts, by a connection that has a place for it. */
  private long<C extends EventEmitter>(begin: (rpc: grpc.Client) => C): C {
    const rpc = this.connections.take();
    try {
      // However the call ends, grpc-js gives its status once.
      return begin(rpc).once("status", () => this.connections.leave(rpc));
    } catch (error) {
      this.connections.leave(rpc); // there is no call that could end
      throw error;
    }
  }
}

/** The user's function may fail; its text may hold anything, its failure may pass. */
async function asked(token: () => string | Promise<string>): Promise<string> {
  try {
    return await token();
  } catch (error) {
    if (error instanceof FacelaneError) throw error;
    const kind = error instanceof Error ? error.name : typeof error;
    throw new FacelaneError("UNAUTHENTICATED", `the function that gives the token failed (${kind})`, {}, true);
  }
}

function isOfRpc(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && "code" in error && "details" in error;
}

function pathOf(method: { name: string; parent: { typeName: string } }): string {
  return `/${method.parent.typeName}/${method.name}`;
}

function encode<D extends DescMessage>(schema: D): (message: MessageShape<D>) => Buffer {
  return (message) => Buffer.from(toBinary(schema, message));
}

function decode<D extends DescMessage>(schema: D): (bytes: Buffer) => MessageShape<D> {
  return (bytes) => fromBinary(schema, bytes);
}

function required<T>(found: T | undefined): T {
  if (found === undefined) throw new FacelaneError("PROTOCOL_VIOLATION", "the server left out what it should give");
  return found;
}
