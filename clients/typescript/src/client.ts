/** One connection to a server, for everything; methods throw `FacelaneError`. */

import { create, fromBinary, toBinary, type DescMessage, type DescMethodServerStreaming, type DescMethodUnary, type MessageInitShape, type MessageShape } from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import { randomUUID } from "node:crypto";
import { accessSync, constants, readFileSync } from "node:fs";
import { fromRpc, FacelaneError } from "./errors.js";
import type { Reconnect } from "./core.js";
import { AnalysisService, type AnalysisOptionsSchema, type AnalyzeStreamRequest, type AnalyzeStreamResponse, type StreamConfigSchema } from "./gen/facelane/v1/analysis_service_pb.js";
import { EventService, type Event, type EventKind } from "./gen/facelane/v1/event_service_pb.js";
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
  private readonly rpc: grpc.Client;
  private readonly timeout: number;
  private held: string | undefined;

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
    this.rpc = new grpc.Client(target, credentials, {
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
  }

  /** Opens a stream: one camera, one recording. */
  analyzeStream(config: MessageInitShape<typeof StreamConfigSchema> = {}, options: StreamOptions = {}): AnalysisStream {
    return new AnalysisStream(
      async () => this.bidi(AnalysisService.method.analyzeStream, await this.metadata()), config, options,
    );
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
    const request = { requestId: randomUUID(), ...more, subjectId, picture: pictureOf(picture) };
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
    const policy = options.reconnect === false ? undefined
      : { maxAttempts: 0, initialDelay: 0.2, maxDelay: 10, multiplier: 2, jitter: 0.2, ...options.reconnect };
    let resumeToken = options.resumeToken ?? "";
    for (let attempts = 0; !options.signal?.aborted; ) {
      const request = { resumeToken, kinds: options.kinds ?? [], sourceIds: options.sourceIds ?? [], galleryIds: options.galleryIds ?? [] };
      const call = this.serverStream(EventService.method.watchEvents, request, await this.metadata());
      const stop = (): void => call.cancel();
      options.signal?.addEventListener("abort", stop);
      let failed: FacelaneError = new FacelaneError("CONNECTION_LOST", "the server ended the watch");
      try {
        for await (const message of call as AsyncIterable<MessageShape<typeof EventService.method.watchEvents.output>>) {
          attempts = 0;
          resumeToken = message.resumeToken || resumeToken;
          yield { event: message.event, resumeToken };
        }
      } catch (error) {
        failed = fromRpc(error as grpc.ServiceError);
      } finally {
        options.signal?.removeEventListener("abort", stop);
        call.on("error", () => undefined);
        call.cancel();
      }
      if (options.signal?.aborted) return;
      attempts += 1;
      if (!policy || !failed.retryable || (policy.maxAttempts && attempts > policy.maxAttempts)) throw failed;
      const wait = Math.min(policy.maxDelay, policy.initialDelay * policy.multiplier ** Math.min(attempts - 1, 64));
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait * (1 + policy.jitter * (2 * Math.random() - 1))));
    }
  }

  /** Ends the connection; streams that are open end with it. */
  close(): void {
    this.rpc.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  private async metadata(): Promise<grpc.Metadata> {
    const metadata = new grpc.Metadata();
    const { token } = this.options;
    if (token !== undefined) {
      this.held ??= (typeof token === "string" ? token : await token()).trim();
      metadata.set("authorization", `Bearer ${this.held}`);
    }
    return metadata;
  }

  private async unary<I extends DescMessage, O extends DescMessage>(method: DescMethodUnary<I, O>, request: MessageInitShape<I>): Promise<MessageShape<O>> {
    try {
      return await this.once(method, request);
    } catch (error) {
      // The token may have been exchanged for another.
      if (!(error instanceof FacelaneError) || error.code !== grpc.status.UNAUTHENTICATED || typeof this.options.token !== "function") throw error;
      this.held = undefined;
      return this.once(method, request);
    }
  }

  private async once<I extends DescMessage, O extends DescMessage>(method: DescMethodUnary<I, O>, request: MessageInitShape<I>): Promise<MessageShape<O>> {
    const metadata = await this.metadata();
    const deadline = new Date(Date.now() + 1000 * this.timeout);
    return new Promise((resolve, reject) => {
      this.rpc.makeUnaryRequest(
        pathOf(method), encode(method.input), decode(method.output), create(method.input, request), metadata, { deadline },
        (error, answer) => (error || !answer ? reject(error ? fromRpc(error) : new FacelaneError("INTERNAL", "no answer")) : resolve(answer)),
      );
    });
  }

  private bidi(method: typeof AnalysisService.method.analyzeStream, metadata: grpc.Metadata): grpc.ClientDuplexStream<AnalyzeStreamRequest, AnalyzeStreamResponse> {
    return this.rpc.makeBidiStreamRequest(pathOf(method), encode(method.input), decode(method.output), metadata);
  }

  private serverStream<I extends DescMessage, O extends DescMessage>(method: DescMethodServerStreaming<I, O>, request: MessageInitShape<I>, metadata: grpc.Metadata): grpc.ClientReadableStream<MessageShape<O>> {
    return this.rpc.makeServerStreamRequest(pathOf(method), encode(method.input), decode(method.output), create(method.input, request), metadata);
  }
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
