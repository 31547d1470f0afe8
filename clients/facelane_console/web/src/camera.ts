/** One camera on a canvas: its pictures, and over each what was found in that very picture. */
import { loggedOut, socket, type Face, type Told } from "./api";
import { t } from "./words";

const COLOURS: Record<string, string> = { MATCH: "#2fbf71", UNKNOWN: "#f2a33a", AMBIGUOUS: "#f2a33a", REJECTED_OOD: "#9aa4b2", NOT_EVALUATED: "#6aa9ff" };
const HELD = 256;
const LOST_MS = 1000, REFUSED_MS = 10_000;
/** Without a new picture for so long, or for so many times as long as there was between the last ones, what is shown is old. */
const OLD_MS = 5000, OLD_TIMES = 3;
/** Of what is written over a picture, as the eye sees it. */
const TEXT_PX = 13;
/** Of a video decoder, one after the other; then the console decodes. */
const MOST_FAILURES = 3;

function label(face: Face): string {
  const who = { MATCH: face.name, UNKNOWN: t("unknown"), AMBIGUOUS: t("ambiguous"), REJECTED_OOD: t("rejected") }[face.decision] ?? t("notEvaluated");
  const live = face.live === "SPOOF" ? ` ⚠ ${t("spoof")}` : face.live === "LIVE" ? " ●" : "";
  return `${who}${face.ood === null ? "" : ` ${Math.round(face.ood * 100)}%`}${live}`;
}

const hex = (n: number) => n.toString(16).padStart(2, "0");

/** The sequence parameter set of a key frame (Annex B), from behind its NAL unit's header on. */
function parameters(unit: Uint8Array, encoding: string): number[] | null {
  for (let i = 0; i + 6 < unit.length; i++) {
    if (unit[i] !== 0 || unit[i + 1] !== 0 || unit[i + 2] !== 1) continue;
    const head = unit[i + 3]!;
    if (encoding === "h264" ? (head & 31) !== 7 : ((head >> 1) & 63) !== 33) continue;
    const found: number[] = [];
    for (let at = i + (encoding === "h264" ? 4 : 5), zeros = 0; at < unit.length && found.length < 16; at++) {
      const byte = unit[at]!;
      if (zeros >= 2 && byte === 3) { zeros = 0; continue; }
      zeros = byte ? 0 : zeros + 1;
      found.push(byte);
    }
    return found;
  }
  return null;
}

/** As WebCodecs names it (RFC 6381): avc1.PPCCLL, or hev1 with profile, compatibility, tier, level and constraints. */
function codecOf(unit: Uint8Array, encoding: string): string | null {
  const set = parameters(unit, encoding);
  if (!set || set.length < 13) return null;
  if (encoding === "h264") return `avc1.${set.slice(0, 3).map(hex).join("")}`;
  const [first, ...rest] = set.slice(1);
  let compatible = 0;
  for (let bit = 0; bit < 32; bit++) if (rest[bit >> 3]! & (128 >> (bit & 7))) compatible |= 1 << bit;
  const constraints = rest.slice(4, 10);
  while (constraints.length && !constraints.at(-1)) constraints.pop();
  return ["hev1", `${["", "A", "B", "C"][first! >> 6]}${first! & 31}`, (compatible >>> 0).toString(16), `${first! & 32 ? "H" : "L"}${rest[10]}`, ...constraints.map(hex)].join(".");
}

async function decodes(codec: string): Promise<boolean> {
  if (!("VideoDecoder" in window)) return false;
  try { return (await VideoDecoder.isConfigSupported({ codec, optimizeForLatency: true })).supported === true; }
  catch { return false; }
}

export type Place = { source: string; stream: string };

export class Camera {
  private ws: WebSocket | null = null;
  private decoder: VideoDecoder | null = null;
  private codec = "";
  private told = new Map<number, Told>();
  private number = 0;
  private stopped = false;
  private busy = false;
  private next: [Told, Uint8Array] | null = null;
  /** Access units that come while the browser is asked what it can decode. */
  private asked: [Told, Uint8Array][] | null = null;
  private failures = 0;
  private asJpeg = "";
  private timer = 0;
  private watch = 0;
  private shown = 0;
  private between = 0;
  painted = 0;

  constructor(private canvas: HTMLCanvasElement, private place: Place, private say: (text: string) => void) {
    this.connect();
    this.watch = window.setInterval(() => this.look(), 1000);
  }

  /** A picture that stands still is no live one: it is said, and seen. */
  private look() {
    if (!this.painted || performance.now() - this.shown < Math.max(OLD_MS, OLD_TIMES * this.between)) return;
    this.canvas.dataset.old = "1";
    this.say(t("old", new Date(Date.now() - (performance.now() - this.shown)).toLocaleTimeString()));
  }

  private connect() {
    if (this.stopped) return;
    const where = this.place.source ? `source=${encodeURIComponent(this.place.source)}` : `stream=${this.place.stream}`;
    const ws = socket(`/live?${where}${this.asJpeg ? "&as=jpeg" : ""}`);
    ws.binaryType = "arraybuffer";
    ws.onmessage = (message) => this.take(message.data as ArrayBuffer);
    ws.onclose = ({ code }) => {
      if (this.ws !== ws) return;
      this.reset();
      if (this.stopped) return;
      if (code === 4401) { loggedOut(); return; }
      this.say(code === 4403 ? t("PERMISSION_DENIED") : code === 4415 ? t("codec") : t("lost"));
      this.timer = window.setTimeout(() => this.connect(), code === 4403 || code === 4415 ? REFUSED_MS : LOST_MS);
    };
    this.ws = ws;
  }

  private take(data: ArrayBuffer) {
    const size = new DataView(data).getUint32(0);
    const told = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size))) as Told;
    const bytes = new Uint8Array(data, 4 + size);
    if (["h264", "h265"].includes(told.encoding)) this.video(told, bytes);
    else if (["jpeg", "png", "webp"].includes(told.encoding)) void this.still(told, bytes);
    else this.say(t("codec"));
  }

  private async still(told: Told, bytes: Uint8Array) {
    this.next = [told, bytes];
    if (this.busy) return;
    this.busy = true;
    while (this.next && !this.stopped) {
      const [about, data] = this.next as [Told, Uint8Array];
      this.next = null;
      try {
        const picture = await createImageBitmap(new Blob([data as BlobPart], { type: `image/${about.encoding}` }));
        this.paint(picture, picture.width, picture.height, about, about.decoded ? "console" : "picture");
        picture.close();
      } catch { /* the next one will do */ }
    }
    this.busy = false;
  }

  private video(told: Told, bytes: Uint8Array) {
    if (this.asked) {
      // The newest group of pictures is what is shown first.
      if (told.key) this.asked = [];
      if (this.asked.length < HELD) this.asked.push([told, bytes]);
      return;
    }
    if (told.key) {
      const codec = codecOf(bytes, told.encoding);
      if (codec && (codec !== this.codec || this.decoder?.state !== "configured")) { void this.ask(codec, told, bytes); return; }
    }
    this.decode(told, bytes);
  }

  private async ask(codec: string, told: Told, bytes: Uint8Array) {
    this.reset();
    this.asked = [[told, bytes]];
    const can = this.failures < MOST_FAILURES && await decodes(codec);
    const waiting = this.asked ?? [];
    this.asked = null;
    if (this.stopped) return;
    if (!can) { this.fallBack(told.encoding); return; }
    this.configure(codec);
    for (const [about, unit] of waiting) this.decode(about, unit);
  }

  /** The console decodes what this browser cannot. */
  private fallBack(encoding: string) {
    this.asJpeg = { h264: "H.264", h265: "H.265" }[encoding] ?? encoding;
    const ws = this.ws;
    this.ws = null;
    ws?.close();
    this.connect();
  }

  private decode(told: Told, bytes: Uint8Array) {
    const decoder = this.decoder;
    if (!decoder || decoder.state !== "configured") return;
    if (decoder.decodeQueueSize > 30 && !told.key) { this.reset(); return; }
    const timestamp = ++this.number * 1000;
    this.told.set(timestamp, told);
    if (this.told.size > HELD) this.told.delete(this.told.keys().next().value!);
    decoder.decode(new EncodedVideoChunk({ type: told.key ? "key" : "delta", timestamp, data: bytes }));
  }

  private configure(codec: string) {
    const decoder = new VideoDecoder({
      output: (frame) => {
        const told = this.told.get(frame.timestamp);
        this.told.delete(frame.timestamp);
        this.failures = 0;
        // A picture that was not analysed has nothing to be drawn over it: the last one that was stays.
        if (told?.faces) this.paint(frame, frame.displayWidth, frame.displayHeight, told, "webcodecs");
        frame.close();
      },
      error: () => { this.codec = ""; this.failures++; },
    });
    decoder.configure({ codec, optimizeForLatency: true });
    this.decoder = decoder;
    this.codec = codec;
  }

  private reset() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.decoder = null;
    this.codec = "";
    this.told.clear();
  }

  private paint(picture: CanvasImageSource, width: number, height: number, told: Told, how: string) {
    const canvas = this.canvas, pen = canvas.getContext("2d");
    if (!pen) return;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    pen.drawImage(picture, 0, 0, width, height);
    const scale = told.width ? width / told.width : 1;
    const names: string[] = [], boxes: number[][] = [];
    const seen = Math.min(canvas.clientWidth / width, canvas.clientHeight / height) || 1;
    const size = Math.round(TEXT_PX / seen);
    pen.font = `600 ${size}px system-ui, sans-serif`;
    pen.lineWidth = 2 / seen;
    for (const face of told.faces ?? []) {
      const [x, y, w, h] = face.box.map((n) => n * scale) as [number, number, number, number];
      const text = label(face), colour = face.live === "SPOOF" ? "#e5484d" : COLOURS[face.decision] ?? "#6aa9ff";
      pen.strokeStyle = colour;
      pen.strokeRect(x, y, w, h);
      const high = Math.round(size * 1.4), top = Math.max(0, y - high), wide = pen.measureText(text).width + size / 2;
      const left = Math.max(0, Math.min(x, width - wide));
      pen.fillStyle = colour;
      pen.fillRect(left, top, wide, high);
      pen.fillStyle = "#0b0e14";
      pen.fillText(text, left + size / 4, top + size * 1.05);
      names.push(text);
      boxes.push([x, y, w, h].map(Math.round));
    }
    this.painted++;
    const now = performance.now();
    if (this.shown) this.between = now - this.shown;
    this.shown = now;
    delete canvas.dataset.old;
    // For whoever tests the wall: which picture is shown, how, and what is drawn over it.
    Object.assign(canvas.dataset, { painted: String(this.painted), frame: String(told.id ?? ""), how, names: names.join("|"), boxes: JSON.stringify(boxes) });
    canvas.setAttribute("aria-label", `${this.place.source || this.place.stream}: ${names.join(", ") || t("noFace")}`);
    this.say(this.asJpeg ? t("asJpeg", this.asJpeg) : "");
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    clearInterval(this.watch);
    this.ws?.close();
    this.reset();
  }
}
