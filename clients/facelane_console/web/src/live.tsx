import { useEffect, useRef, useState } from "preact/hooks";
import type { Stream } from "./api";
import { Camera, type Place } from "./camera";
import { Heading, Problem, useTold, Waiting } from "./parts";
import { t } from "./words";

const MOST_CAMERAS = 16;

function Tile({ source, stream }: Place) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [note, say] = useState(t("connecting"));
  useEffect(() => {
    let last = note;
    const camera = new Camera(canvas.current!, { source, stream }, (text) => { if (text !== last) { last = text; say(text); } });
    return () => camera.stop();
  }, [source, stream]);
  const enlarge = () => { void (document.fullscreenElement ? document.exitFullscreen() : canvas.current?.requestFullscreen()); };
  const name = source || stream;
  return (
    <figure class="tile">
      <canvas ref={canvas} role="img" aria-label={name} data-source={name} width="640" height="360" />
      <figcaption><button class="plain" onClick={enlarge} title={t("enlarge")} aria-label={`${name}: ${t("enlarge")}`}>{name}</button><span role="status" class="small">{note}</span></figcaption>
    </figure>
  );
}

export function Live() {
  const [streams, problem] = useTold<Stream[]>("/streams", 3000);
  const [wanted, want] = useState("");
  const places = new Map<string, Place>();
  for (const { source, stream } of streams ?? []) places.set(source || stream, { source, stream: source ? "" : stream });
  const names = [...places.keys()].sort();
  const matching = names.filter((name) => name.toLowerCase().includes(wanted.toLowerCase()));
  const shown = matching.slice(0, MOST_CAMERAS);
  return (
    <section aria-labelledby="head">
      <Heading>{t("live")}</Heading>
      {problem && <Problem text={problem} />}
      {!streams && !problem && <Waiting />}
      {streams && !names.length && <p>{t("noCameras")}</p>}
      {names.length > 4 && <div class="row filters"><label>{t("source")} <input type="search" value={wanted} onInput={(e) => want(e.currentTarget.value)} /></label>
        {shown.length < names.length && <span role="status" class="small">{t("camerasOf", shown.length, names.length)}</span>}</div>}
      <div class={`wall n${Math.ceil(Math.sqrt(shown.length))}`}>{shown.map((name) => <Tile key={name} {...places.get(name)!} />)}</div>
    </section>
  );
}
