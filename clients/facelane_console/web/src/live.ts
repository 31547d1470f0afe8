/** One camera on a canvas: its pictures, and over each what was found in that very picture. */
import { socket, type Face, type Told } from "./api";
import { t } from "./words";

const COLOURS: Record<string, string> = { MATCH: "#2fbf71", UNKNOWN: "#f2a33a", AMBIGUOUS: "#f2a33a", REJECTED_OOD: "#9aa4b2", NOT_EVALUATED: "#6aa9ff" };
const HELD = 256;

function label(face: Face): string {
  const who = { MATCH: face.name, UNKNOWN: t("unknown"), AMBIGUOUS: t("ambiguous"), REJECTED_OOD: t("rejected") }[face.decision] ?? t("notEvaluated");
  const live = face.live === "SPOOF" ? ` ⚠ ${t("spoof")}` : face.live === "LIVE" ? " ●" : "";
  return `${who}${face.ood === null ? "" : ` ${Math.round(face.ood * 100)}%`}${live}`;
}

/** avc1.PPCCLL, from the sequence parameter set of a key frame (Annex B). */
function codecOf(unit: Uint8Array): string | null {
  for (let i = 0; i + 6 < unit.length; i++) {
    if (unit[i] === 0 && unit[i + 1] === 0 && unit[i + 2] === 1 && (unit[i + 3]! & 31) === 7) {
      return `avc1.${[4, 5, 6].map((n) => unit[i + n]!.toString(16).padStart(2, "0")).join("")}`;
    }
  }
  return null;
}

export class Camera {
  private ws: WebSocket | null = null;
  private decoder: VideoDecoder | null = null;
  private codec = "";
  private told = new Map<number, Told>();
  private number = 0;
  private stopped = false;
  private busy = false;
  private timer = 0;
  painted = 0;

  constructor(private canvas: HTMLCanvasElement, private source: string, private say: (text: string) => void) { this.connect(); }

  private connect() {
    if (this.stopped) return;
    const ws = socket(`/live?source=${encodeURIComponent(this.source)}`);
    ws.binaryType = "arraybuffer";
    ws.onmessage = (message) => this.take(message.data as ArrayBuffer);
    ws.onclose = () => {
      this.reset();
      if (this.stopped) return;
      this.say(t("lost"));
      this.timer = window.setTimeout(() => this.connect(), 1000);
    };
    this.ws = ws;
  }

  private take(data: ArrayBuffer) {
    const size = new DataView(data).getUint32(0);
    const told = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size))) as Told;
    const bytes = new Uint8Array(data, 4 + size);
    if (told.encoding === "h264") this.video(told, bytes);
    else if (["jpeg", "png", "webp"].includes(told.encoding)) void this.still(told, bytes);
    else this.say(t("codec"));
  }

  private async still(told: Told, bytes: Uint8Array) {
    if (this.busy) return;
    this.busy = true;
    try {
      const picture = await createImageBitmap(new Blob([bytes as BlobPart], { type: `image/${told.encoding}` }));
      this.paint(picture, picture.width, picture.height, told);
      picture.close();
    } catch { /* the next one will do */ } finally { this.busy = false; }
  }

  private video(told: Told, bytes: Uint8Array) {
    if (told.key) {
      const codec = codecOf(bytes);
      if (codec && (codec !== this.codec || this.decoder?.state !== "configured")) this.configure(codec);
    }
    const decoder = this.decoder;
    if (!decoder || decoder.state !== "configured") return;
    if (decoder.decodeQueueSize > 30 && !told.key) { this.reset(); return; }
    const timestamp = ++this.number * 1000;
    this.told.set(timestamp, told);
    if (this.told.size > HELD) this.told.delete(this.told.keys().next().value!);
    decoder.decode(new EncodedVideoChunk({ type: told.key ? "key" : "delta", timestamp, data: bytes }));
  }

  private configure(codec: string) {
    this.reset();
    if (!("VideoDecoder" in window)) { this.say(t("codec")); return; }
    const decoder = new VideoDecoder({
      output: (frame) => {
        const told = this.told.get(frame.timestamp);
        this.told.delete(frame.timestamp);
        // A picture that was not analysed has nothing to be drawn over it: the last one that was stays.
        if (told?.faces) this.paint(frame, frame.displayWidth, frame.displayHeight, told);
        frame.close();
      },
      error: () => { this.codec = ""; },
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

  private paint(picture: CanvasImageSource, width: number, height: number, told: Told) {
    const canvas = this.canvas, pen = canvas.getContext("2d");
    if (!pen) return;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    pen.drawImage(picture, 0, 0, width, height);
    const scale = told.width ? width / told.width : 1;
    const names: string[] = [];
    const size = Math.max(12, Math.round(width / 45));
    pen.font = `600 ${size}px system-ui, sans-serif`;
    pen.lineWidth = Math.max(2, width / 400);
    for (const face of told.faces ?? []) {
      const [x, y, w, h] = face.box.map((n) => n * scale) as [number, number, number, number];
      const text = label(face), colour = face.live === "SPOOF" ? "#e5484d" : COLOURS[face.decision] ?? "#6aa9ff";
      pen.strokeStyle = colour;
      pen.strokeRect(x, y, w, h);
      const top = Math.max(0, y - size - 6);
      pen.fillStyle = colour;
      pen.fillRect(x, top, pen.measureText(text).width + 8, size + 6);
      pen.fillStyle = "#0b0e14";
      pen.fillText(text, x + 4, top + size);
      names.push(text);
    }
    this.painted++;
    canvas.dataset.painted = String(this.painted);
    canvas.dataset.frame = String(told.id ?? "");
    canvas.dataset.names = names.join("|");
    canvas.setAttribute("aria-label", `${this.source}: ${names.join(", ") || t("nobody")}`);
    this.say("");
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    this.ws?.close();
    this.reset();
  }
}
