/** Which connection each call of a client that lasts goes by: streams and watches. */

import type * as grpc from "@grpc/grpc-js";

/** A server takes a hundred calls of one connection; what is more would wait without a word. */
export const CALLS_PER_CONNECTION = 64;

/** The client's own, which stays open for everything else too, and others as those before are full. */
export class Connections {
  private readonly calls = new Map<grpc.Client, number>();

  constructor(readonly own: grpc.Client, private readonly another: () => grpc.Client) {
    this.calls.set(own, 0);
  }

  /** For one call, until `leave`. */
  take(): grpc.Client {
    for (const [rpc, calls] of this.calls) {
      if (calls < CALLS_PER_CONNECTION) {
        this.calls.set(rpc, calls + 1);
        return rpc;
      }
    }
    const rpc = this.another();
    this.calls.set(rpc, 1);
    return rpc;
  }

  leave(rpc: grpc.Client): void {
    const left = (this.calls.get(rpc) ?? 1) - 1;
    if (left || rpc === this.own) {
      this.calls.set(rpc, left);
    } else {
      this.calls.delete(rpc);
      rpc.close();
    }
  }

  close(): void {
    for (const rpc of this.calls.keys()) rpc.close();
  }
}
