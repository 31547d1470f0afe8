import type { Refusal } from "./words";

export type May = { view: boolean; people: boolean; events: boolean; correct: boolean; enroll: boolean; delete: boolean };
export type Face = { track: number; box: [number, number, number, number]; decision: string; name: string; similarity: number | null; ood: number | null; live: string };
export type Told = { encoding: string; key: boolean; id?: number; width?: number; height?: number; faces?: Face[]; drop?: string; decoded?: string };
export type Stream = { stream: string; source: string; gallery: string; encoding: string | null; fps: number; results: number; age: number; tracks: number; drops: number; received: number; watchers: number };
export type Event_ = { sequence: number; kind: string; time: number | null; source: string; gallery: string; decision: string; name: string; live: string; message: string; pool: string; display_name?: string; ood?: number | null; similarity?: number | null; looks?: number; seconds?: number; camera_time?: number | null; picture?: boolean; known?: boolean; rule: string; candidate: string };
export type Correction = { id: string; subject: string; is_not: boolean; time: number | null };
export type Template = { id: string; quality: number; ood: number; time: number | null };
export type Person = { id: string; gallery: string; display_name: string; labels: Record<string, string>; templates: number; faces?: Template[]; corrections?: Correction[] };
export type People = { people: Person[]; more: boolean };
export type Pool = { name: string; state: string; model: string; queued: number; failed: number; completed: number; budget: number; workers: { id: string; state: string; device: string; restarts: number; last_loss: string; mib: number }[] };
export type System = { health: string; version: string; streams: number; load: number | null; draining: boolean; shards: [number, string, number, number, string][]; degradations: string[][]; models: string[][]; pools: Pool[]; cameras: Stream[] };

let csrf = "";
let onLoggedOut = () => {};
export const whenLoggedOut = (then: () => void) => { onLoggedOut = then; };
export const loggedOut = () => onLoggedOut();

export async function call<T>(method: string, path: string, body?: BodyInit | object): Promise<T> {
  const plain = body !== undefined && !(body instanceof Blob);
  const answer = await fetch(`/api${path}`, {
    method, cache: "no-store", credentials: "same-origin",
    headers: { "x-csrf-token": csrf, ...(plain ? { "content-type": "application/json" } : {}) },
    body: plain ? JSON.stringify(body) : (body as BodyInit | undefined),
  }).catch((error: Error) => { throw { reason: "NO_CONSOLE", message: error.message } satisfies Refusal; });
  const said = await answer.json().catch(() => ({ reason: "UNREADABLE", message: answer.statusText }));
  if (!answer.ok) {
    if (answer.status === 401 && path !== "/login") onLoggedOut();
    throw said as Refusal;
  }
  if (typeof said.csrf === "string") csrf = said.csrf;
  return said as T;
}
export const socket = (path: string) => new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api${path}`);
