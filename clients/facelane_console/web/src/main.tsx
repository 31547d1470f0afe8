import { render, type ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { call, socket, whenLoggedOut, type Event_, type May, type Person, type Stream, type System } from "./api";
import { Camera } from "./live";
import { language, reason, speak, t, type Refusal } from "./words";
import "./style.css";

const MOST_CAMERAS = 16;
const VIEWS = ["live", "events", "people", "system"] as const;
type View = (typeof VIEWS)[number];
const shown = (view: View, may: May) => ({ live: may.view, events: may.events, people: may.people, system: true })[view];
const number = (value: number | null | undefined, digits = 2) => (value == null ? "–" : value.toFixed(digits));
const when = (seconds: number | null | undefined) => (seconds == null ? "–" : new Date(seconds * 1000).toLocaleString(language() === "zh" ? "zh-CN" : "en"));

function useTold<T>(path: string, every: number): [T | null, string, () => void] {
  const [value, set] = useState<T | null>(null);
  const [problem, complain] = useState("");
  const [round, again] = useState(0);
  useEffect(() => {
    let over = false, timer = 0;
    const ask = async () => {
      try { const found = await call<T>("GET", path); if (!over) { set(found); complain(""); } }
      catch (error) { if (!over) complain(reason(error as Refusal)); }
      if (!over && every) timer = window.setTimeout(ask, every);
    };
    void ask();
    return () => { over = true; clearTimeout(timer); };
  }, [path, every, round]);
  return [value, problem, () => again((n) => n + 1)];
}

const Problem = ({ text }: { text: string }) => <p class="problem" role="alert">{text}</p>;

function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => { box.current?.showModal(); }, []);
  return <dialog ref={box} aria-label={title} onClose={close}><h2>{title}</h2>{children}</dialog>;
}

// -- live ------------------------------------------------------------------------------------

function Tile({ source }: { source: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [note, say] = useState(t("connecting"));
  useEffect(() => {
    let last = note;
    const camera = new Camera(canvas.current!, source, (text) => { if (text !== last) { last = text; say(text); } });
    return () => camera.stop();
  }, [source]);
  const enlarge = () => { void (document.fullscreenElement ? document.exitFullscreen() : canvas.current?.requestFullscreen()); };
  return (
    <figure class="tile">
      <canvas ref={canvas} role="img" aria-label={source} data-source={source} width="640" height="360" />
      <figcaption><button class="plain" onClick={enlarge}>{source}</button>{note && <span role="status">{note}</span>}</figcaption>
    </figure>
  );
}

function Live() {
  const [streams, problem] = useTold<Stream[]>("/streams", 3000);
  const sources = [...new Set((streams ?? []).map((one) => one.source).filter(Boolean))].sort().slice(0, MOST_CAMERAS);
  return (
    <section aria-labelledby="head">
      <h1 id="head">{t("live")}</h1>
      {problem && <Problem text={problem} />}
      {streams && !sources.length && <p>{t("noCameras")}</p>}
      <div class={`wall n${Math.ceil(Math.sqrt(sources.length))}`}>{sources.map((source) => <Tile key={source} source={source} />)}</div>
    </section>
  );
}

// -- events ----------------------------------------------------------------------------------

const KINDS = ["SUBJECT_SEEN", "UNKNOWN_SEEN", "SPOOF_SUSPECTED", "FACE_HIDDEN", "STREAM_OPENED", "STREAM_CLOSED", "POOL_CHANGED"];

function EventRow({ event, may }: { event: Event_; may: May }) {
  const [known, know] = useState(event.known ?? false);
  const [note, say] = useState("");
  const [undo, offer] = useState("");
  const [asking, ask] = useState(false);
  const [who, name] = useState("");
  const whom = event.display_name || event.name || t("nobody");
  const correct = async (body: object) => {
    try {
      const done = await call<{ id: string; subject: string; is_not: boolean }>("POST", `/events/${event.sequence}/correct`, body);
      offer(done.id);
      say(done.is_not ? t("corrected", done.subject) : t("correctedIs", done.subject));
    } catch (error) { say(reason(error as Refusal)); }
    ask(false);
  };
  const takeBack = async () => {
    try { await call("DELETE", `/corrections/${undo}?gallery=${encodeURIComponent(event.gallery)}`); offer(""); say(""); }
    catch (error) { say(reason(error as Refusal)); }
  };
  const acknowledge = async () => { await call("POST", `/events/${event.sequence}/acknowledge`); know(true); };
  return (
    <li class={`event ${known ? "known" : ""}`} data-sequence={event.sequence} data-kind={event.kind}>
      {event.picture ? <img loading="lazy" width="112" height="112" src={`/api/events/${event.sequence}/picture`} alt={t("pictureOf", whom)} /> : <div class="nopicture" />}
      <div class="grow">
        <h2><span class={`badge ${event.kind}`}>{event.kind}</span> {event.looks === undefined ? event.message || event.pool : whom}</h2>
        <p class="small">{when(event.time)} · {event.source || "–"}{event.camera_time ? ` · ${when(event.camera_time)}` : ""}</p>
        {event.looks !== undefined && <p class="small">{t("looks", event.looks)} · {t("similarity")} {number(event.similarity)} · {t("trust")} {number(event.ood)} · {event.live}</p>}
        <p role="status" class="small">{note}</p>
        <div class="row">
          {!known ? <button onClick={acknowledge}>{t("acknowledge")}</button> : <span class="small">✓ {t("acknowledged")}</span>}
          {may.correct && event.picture && !undo && event.name && <button onClick={() => correct({})}>{t("notHim", event.name)}</button>}
          {may.correct && event.picture && !asking && <button onClick={() => ask(true)}>{t("isHim")}</button>}
          {undo && <button onClick={takeBack}>{t("undo")}</button>}
        </div>
        {asking && (
          <form class="row" onSubmit={(e) => { e.preventDefault(); void correct({ subject: who, create: true }); }}>
            <label>{t("whoIsIt")} <input required value={who} onInput={(e) => name(e.currentTarget.value)} /></label>
            <button>{t("save")}</button><button type="button" onClick={() => ask(false)}>{t("cancel")}</button>
          </form>
        )}
      </div>
    </li>
  );
}

function Events({ may }: { may: May }) {
  const [kind, choose] = useState("");
  const [source, from] = useState("");
  const [events, set] = useState<Event_[]>([]);
  const [before, older] = useState(0);
  const [problem, complain] = useState("");
  const end = useRef<HTMLButtonElement>(null);
  const asked = `${kind ? `&kind=${kind}` : ""}${source ? `&source=${encodeURIComponent(source)}` : ""}`;
  const page = async (at: number) => {
    try {
      const found = await call<{ events: Event_[]; before: number }>("GET", `/events?before=${at}${asked}`);
      set((now) => (at ? [...now, ...found.events] : found.events));
      older(found.before);
      complain("");
    } catch (error) { complain(reason(error as Refusal)); }
  };
  useEffect(() => { void page(0); }, [asked]);
  useEffect(() => {
    const news = socket("/events/live");
    news.onmessage = (message) => {
      const event = JSON.parse(message.data as string) as Event_;
      if ((!kind || event.kind === kind) && (!source || event.source === source)) set((now) => (now.some((e) => e.sequence === event.sequence) ? now : [event, ...now].slice(0, 1000)));
    };
    return () => news.close();
  }, [asked]);
  useEffect(() => {
    // Scrolling to the end asks for what is older; the button is there for everybody else.
    const seen = new IntersectionObserver((entries) => { if (entries[0]?.isIntersecting && before) void page(before); });
    if (end.current) seen.observe(end.current);
    return () => seen.disconnect();
  }, [before, asked]);
  return (
    <section aria-labelledby="head">
      <h1 id="head">{t("events")}</h1>
      <div class="row filters">
        <label>{t("filter")} <select value={kind} onChange={(e) => choose(e.currentTarget.value)}>
          <option value="">{t("all")}</option>{KINDS.map((one) => <option key={one}>{one}</option>)}
        </select></label>
        <label>{t("source")} <input value={source} onChange={(e) => from(e.currentTarget.value)} /></label>
      </div>
      {problem && <Problem text={problem} />}
      {!events.length && !problem && <p>{t("none")}</p>}
      <ol class="events">{events.map((event) => <EventRow key={event.sequence} event={event} may={may} />)}</ol>
      {before > 0 && <button ref={end} onClick={() => page(before)}>{t("more")}</button>}
    </section>
  );
}

// -- people ----------------------------------------------------------------------------------

function Webcam({ take }: { take: (picture: Blob) => void }) {
  const video = useRef<HTMLVideoElement>(null);
  const [on, turn] = useState(false);
  useEffect(() => {
    if (!on) return;
    let stream: MediaStream | null = null, over = false;
    void navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } }).then((got) => {
      stream = got;
      if (over) got.getTracks().forEach((track) => track.stop());
      else if (video.current) video.current.srcObject = got;
    }).catch(() => turn(false));
    return () => { over = true; stream?.getTracks().forEach((track) => track.stop()); };
  }, [on]);
  const shoot = () => {
    const from = video.current!, canvas = document.createElement("canvas");
    canvas.width = from.videoWidth; canvas.height = from.videoHeight;
    canvas.getContext("2d")!.drawImage(from, 0, 0);
    canvas.toBlob((blob) => { if (blob) take(blob); turn(false); }, "image/jpeg", 0.95);
  };
  if (!on) return <button type="button" onClick={() => turn(true)}>{t("webcam")}</button>;
  return <div><video ref={video} autoplay muted playsinline aria-label={t("webcam")} /><button type="button" onClick={shoot}>{t("take")}</button></div>;
}

function Enrol({ done }: { done: () => void }) {
  const [id, setId] = useState(""), [name, setName] = useState("");
  const [picture, choose] = useState<Blob | null>(null);
  const [said, say] = useState<[string, boolean]>(["", true]);
  const send = async (e: Event) => {
    e.preventDefault();
    if (!picture) return;
    try {
      const made = await call<{ face: { quality: number }; warnings: string[] }>("POST", `/people/${encodeURIComponent(id)}/faces?name=${encodeURIComponent(name)}`, picture);
      say([[t("enrolled", number(made.face.quality)), ...made.warnings.map((why) => reason({ reason: why, message: why }))].join(" "), true]);
      done();
    } catch (error) { say([reason(error as Refusal), false]); }
  };
  return (
    <form class="card" onSubmit={send} aria-labelledby="enrol">
      <h2 id="enrol">{t("enrol")}</h2>
      <label>{t("id")} <input name="id" required pattern="[A-Za-z0-9_.@:\-]{1,128}" value={id} onInput={(e) => setId(e.currentTarget.value)} /></label>
      <label>{t("name")} <input name="name" value={name} onInput={(e) => setName(e.currentTarget.value)} /></label>
      <label>{t("picture")} <input name="picture" type="file" accept="image/jpeg,image/png,image/webp" onChange={(e) => choose(e.currentTarget.files?.[0] ?? null)} /></label>
      <Webcam take={choose} />
      <button disabled={!picture || !id}>{t("enrol")}</button>
      <p role="status" class={said[1] ? "good" : "problem"}>{said[0]}</p>
    </form>
  );
}

function Card({ person, changed, may }: { person: Person; changed: () => void; may: May }) {
  const [open, toggle] = useState(false);
  const [full, fill] = useState<Person | null>(null);
  const [asking, ask] = useState(false);
  const [receipt, show] = useState<{ templates: number; receipt: string } | null>(null);
  const [problem, complain] = useState("");
  const path = `/people/${encodeURIComponent(person.id)}`;
  const load = () => call<Person>("GET", path).then(fill, (error) => complain(reason(error as Refusal)));
  const erase = async () => {
    ask(false);
    try { show(await call("DELETE", path)); } catch (error) { complain(reason(error as Refusal)); }
  };
  const forget = async (id: string) => {
    try { await call("DELETE", `/templates/${id}`); await load(); changed(); } catch (error) { complain(reason(error as Refusal)); }
  };
  return (
    <li class="card" data-subject={person.id}>
      <h2>{person.display_name || person.id}</h2>
      <p class="small">{person.id} · {t("faces", person.templates)}</p>
      {problem && <Problem text={problem} />}
      <div class="row">
        <button aria-expanded={open} onClick={() => { toggle(!open); if (!open) void load(); }}>{t("faces", person.templates)}</button>
        {may.people && <button class="danger" onClick={() => ask(true)}>{t("delete")}</button>}
      </div>
      {open && full?.faces && <ul class="faces">{full.faces.map((face) => (
        <li key={face.id}><meter min="0" max="1" value={face.quality} aria-label={t("quality")} /> {t("quality")} {number(face.quality)} · {t("trust")} {number(face.ood)} · {when(face.time)}
          <button class="danger" onClick={() => forget(face.id)} aria-label={`${t("delete")} ${when(face.time)}`}>{t("delete")}</button></li>))}</ul>}
      {asking && <Dialog title={t("deleteAll", person.display_name || person.id)} close={() => ask(false)}><div class="row"><button class="danger" onClick={erase}>{t("delete")}</button><button onClick={() => ask(false)}>{t("cancel")}</button></div></Dialog>}
      {receipt && <Dialog title={t("receipt")} close={() => { show(null); changed(); }}>
        <p>{t("deleted", receipt.templates)}</p><pre class="receipt" tabIndex={0}>{receipt.receipt}</pre>
        <div class="row"><a class="button" download={`erasure-${Date.now()}.json`} href={URL.createObjectURL(new Blob([receipt.receipt], { type: "application/json" }))}>{t("copy")}</a><button onClick={() => { show(null); changed(); }}>{t("close")}</button></div>
      </Dialog>}
    </li>
  );
}

function People({ may }: { may: May }) {
  const [q, search] = useState("");
  const [people, problem, again] = useTold<Person[]>(`/people?q=${encodeURIComponent(q)}`, 0);
  return (
    <section aria-labelledby="head">
      <h1 id="head">{t("people")}</h1>
      <label>{t("search")} <input type="search" value={q} onInput={(e) => search(e.currentTarget.value)} /></label>
      {problem && <Problem text={problem} />}
      {may.enroll && <Enrol done={again} />}
      {people && !people.length && <p>{t("none")}</p>}
      <ul class="people">{(people ?? []).map((person) => <Card key={`${person.id}-${person.templates}`} person={person} changed={again} may={may} />)}</ul>
    </section>
  );
}

// -- system ----------------------------------------------------------------------------------

function Plot({ values, name }: { values: number[]; name: string }) {
  const top = Math.max(...values, 1e-6);
  const points = values.map((value, n) => `${(n / 59) * 120},${28 - (value / top) * 26}`).join(" ");
  return <svg class="plot" viewBox="0 0 120 30" role="img" aria-label={`${name}: ${number(values.at(-1))}`}><polyline points={points} /></svg>;
}

function SystemView() {
  const [told, problem] = useTold<System>("/system", 2000);
  const past = useRef(new Map<string, { age: number[]; drops: number[]; dropped: number }>());
  useEffect(() => {
    for (const camera of told?.cameras ?? []) {
      const had = past.current.get(camera.stream) ?? { age: [], drops: [], dropped: camera.drops };
      past.current.set(camera.stream, { age: [...had.age, camera.age * 1000].slice(-60), drops: [...had.drops, camera.drops - had.dropped].slice(-60), dropped: camera.drops });
    }
    for (const stream of [...past.current.keys()]) if (!told?.cameras.some((one) => one.stream === stream)) past.current.delete(stream);
  }, [told]);
  if (!told) return <section aria-labelledby="head"><h1 id="head">{t("system")}</h1>{problem && <Problem text={problem} />}</section>;
  return (
    <section aria-labelledby="head">
      <h1 id="head">{t("system")}</h1>
      {problem && <Problem text={problem} />}
      <dl class="figures">
        <div><dt>{t("health")}</dt><dd class={told.health === "SERVING" ? "good" : "problem"}>{told.health}</dd></div>
        <div><dt>{t("cameras")}</dt><dd>{told.streams}</dd></div>
        <div><dt>{t("load")}</dt><dd>{number(told.load)}</dd></div>
        <div><dt>facelane</dt><dd>{told.version}</dd></div>
      </dl>
      {told.degradations.map(([part, cause, text]) => <Problem key={part} text={`${t("amiss")}: ${part} ${cause}: ${text}`} />)}
      <div class="scroll" tabIndex={0} role="region" aria-label={t("pools")}><table><caption>{t("pools")}</caption>
        <thead><tr>{[t("worker"), t("state"), t("device"), t("memory"), t("restarts"), t("loss"), t("queued")].map((h) => <th scope="col" key={h}>{h}</th>)}</tr></thead>
        <tbody>{told.pools.flatMap((pool) => pool.workers.map((worker) => (
          <tr key={worker.id}><th scope="row">{worker.id}</th><td>{worker.state}</td><td>{worker.device}</td><td>{worker.mib} MiB</td><td>{worker.restarts}</td><td>{worker.last_loss || "–"}</td><td>{pool.queued}</td></tr>)))}</tbody></table></div>
      <div class="scroll" tabIndex={0} role="region" aria-label={t("cameras")}><table><caption>{t("cameras")}</caption>
        <thead><tr>{[t("source"), t("rate"), t("age"), t("drops"), t("tracks")].map((h) => <th scope="col" key={h}>{h}</th>)}</tr></thead>
        <tbody>{told.cameras.map((camera) => { const had = past.current.get(camera.stream); return (
          <tr key={camera.stream}><th scope="row">{camera.source || camera.stream}</th><td>{number(camera.results, 1)}</td>
            <td>{Math.round(camera.age * 1000)} ms <Plot name={t("age")} values={had?.age ?? []} /></td><td>{camera.drops} <Plot name={t("drops")} values={had?.drops ?? []} /></td><td>{camera.tracks}</td></tr>); })}</tbody></table></div>
      <ul>{told.models.map(([task, name, version]) => <li key={task}>{task}: {name} {version}</li>)}</ul>
    </section>
  );
}

// -- the page --------------------------------------------------------------------------------

function Login({ enter }: { enter: (may: May) => void }) {
  const [key, type] = useState(""), [problem, complain] = useState("");
  const send = async (e: Event) => {
    e.preventDefault();
    try { enter((await call<{ may: May }>("POST", "/login", { key })).may); } catch (error) { complain(reason(error as Refusal)); }
  };
  return (
    <main class="login"><form class="card" onSubmit={send}>
      <h1>facelane</h1>
      <label>{t("key")} <input name="key" type="password" autocomplete="off" aria-describedby="hint" value={key} onInput={(e) => type(e.currentTarget.value)} /></label>
      <p id="hint" class="small">{t("keyHint")}</p>
      <button>{t("login")}</button>
      {problem && <Problem text={problem} />}
    </form></main>
  );
}

function App() {
  const [may, enter] = useState<May | null | undefined>(undefined);
  const [hash, go] = useState(location.hash.slice(1));
  const [, again] = useState(0);
  useEffect(() => {
    whenLoggedOut(() => enter(null));
    call<{ may: May }>("GET", "/session").then((found) => enter(found.may), () => enter(null));
    const moved = () => go(location.hash.slice(1));
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const words = () => { speak(language() === "en" ? "zh" : "en"); again((n) => n + 1); };
  const theme = () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  };
  if (may === undefined) return null;
  if (may === null) return <Login enter={enter} />;
  const views = VIEWS.filter((view) => shown(view, may));
  const view = views.find((one) => one === hash) ?? views[0]!;
  const leave = () => call("POST", "/logout").catch(() => null).then(() => enter(null));
  return (
    <>
      <a class="skip" href="#content" onClick={(e) => { e.preventDefault(); document.getElementById("content")?.focus(); }}>{t("skip")}</a>
      <header><strong>facelane</strong>
        <nav aria-label="facelane">{views.map((one) => <a key={one} href={`#${one}`} aria-current={one === view ? "page" : undefined}>{t(one)}</a>)}</nav>
        <div class="row"><button class="plain" onClick={words}>{t("language")}</button><button class="plain" onClick={theme}>{t("theme")}</button><button class="plain" onClick={leave}>{t("logout")}</button></div>
      </header>
      <main id="content" tabIndex={-1} key={language()}>
        {view === "live" && <Live />}{view === "events" && <Events may={may} />}{view === "people" && <People may={may} />}{view === "system" && <SystemView />}
      </main>
    </>
  );
}

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
render(<App />, document.getElementById("app")!);
