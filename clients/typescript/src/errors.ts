/** What went wrong, with a reason that a program can act on: those of `error_reason.proto`, and the client's own. */

import { fromBinary } from "@bufbuild/protobuf";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { status as Code, type ServiceError } from "@grpc/grpc-js";
import { ErrorInfoSchema, type ErrorInfo } from "./gen/google/rpc/error_details_pb.js";
import { StatusSchema, type Status } from "./gen/google/rpc/status_pb.js";

/** Reasons whose failures may pass without a change of the request. */
const RETRYABLE = new Set([
  "DEADLINE_EXCEEDED", "POOL_UNAVAILABLE", "POOL_OVERLOADED", "WORKER_LOST", "OUT_OF_MEMORY", "STREAM_LIMIT",
  "CAPACITY", "SLOW_READER", "DRAINING", "GALLERY_UNAVAILABLE", "CONNECTION_LOST", "UNREACHABLE",
]);

/** `retryable`: the same call may succeed later without a change. */
export class FacelaneError extends Error {
  override readonly name = "FacelaneError";

  constructor(
    readonly reason: string,
    message: string,
    readonly metadata: Readonly<Record<string, string>> = {},
    readonly retryable: boolean = isRetryable(reason, metadata),
    /** gRPC's status, where a call failed. */
    readonly code?: Code,
  ) {
    super(message);
  }
}

function isRetryable(reason: string, metadata: Readonly<Record<string, string>>): boolean {
  // The server's own word first, then the reason's nature.
  const said = metadata["retryable"]?.toLowerCase();
  return said === "true" || (said !== "false" && RETRYABLE.has(reason));
}

/** The reason among a status's details. */
export function errorInfo(status: Status): ErrorInfo | undefined {
  for (const detail of status.details) {
    try {
      const found = anyUnpack(detail, ErrorInfoSchema);
      if (found) return found;
    } catch {
      // Another's, or damaged: the status itself is what counts then.
    }
  }
  return undefined;
}

/** The typed error of a failed call. */
export function fromRpc(error: ServiceError): FacelaneError {
  const raw = error.metadata?.get("grpc-status-details-bin")[0];
  if (raw instanceof Uint8Array) {
    try {
      const info = errorInfo(fromBinary(StatusSchema, raw));
      if (info) {
        return new FacelaneError(info.reason, error.details, info.metadata, undefined, error.code);
      }
    } catch {
      // No status of google.rpc: gRPC's own words below.
    }
  }
  const reason =
    error.code === Code.UNAVAILABLE ? "UNREACHABLE"
    : error.code === Code.DEADLINE_EXCEEDED ? "DEADLINE_EXCEEDED"
    : error.code === Code.CANCELLED ? "CANCELLED"
    : error.code === Code.UNAUTHENTICATED ? "UNAUTHENTICATED"
    : "INTERNAL";
  const metadata = { grpc_status: Code[error.code] ?? String(error.code) };
  return new FacelaneError(reason, error.details || error.message, metadata, undefined, error.code);
}

const BROKEN = new Set<Code | undefined>([Code.UNAVAILABLE, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN]);

/** gRPC's own words for a connection that died under a stream, as one error. */
export function asLost(error: FacelaneError): FacelaneError {
  if (!("grpc_status" in error.metadata) || !BROKEN.has(error.code)) return error;
  return new FacelaneError("CONNECTION_LOST", `the connection to the server broke (${error.message})`, error.metadata);
}
