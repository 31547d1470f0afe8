/** `@facelane/client`: streams, pictures, galleries and events of a facelane server. */

export { Client, defaultTarget, type ClientOptions, type NamingOptions, type Tls, type Watched, type WatchOptions } from "./client.js";
export { type Counts, type Reconnect } from "./core.js";
export { errorInfo, FacelaneError } from "./errors.js";
export { type PictureInput } from "./pictures.js";
export { AnalysisStream, type FrameOptions, type StreamOptions } from "./stream.js";
export * from "./gen/facelane/v1/analysis_service_pb.js";
export * from "./gen/facelane/v1/event_service_pb.js";
export * from "./gen/facelane/v1/face_pb.js";
export * from "./gen/facelane/v1/gallery_service_pb.js";
export * from "./gen/facelane/v1/server_service_pb.js";
