import { useEffect, useRef, useState } from "preact/hooks";
import { call, type May, type People as Found, type Person, type Template } from "./api";
import { Ask, Dialog, Heading, number, Problem, useSettled, useTold, Waiting, when } from "./parts";
import { reason, t, type Refusal } from "./words";

/** People that are shown at first, and more each time; beyond the most of them one searches. */
const PAGE = 100, MOST = 2000;

function Webcam({ take }: { take: (picture: Blob) => void }) {
  const video = useRef<HTMLVideoElement>(null);
  const [on, turn] = useState(false);
  const [ready, be] = useState(false);
  const [problem, complain] = useState("");
  useEffect(() => {
    if (!on) return;
    let stream: MediaStream | null = null, over = false;
    const asked = navigator.mediaDevices?.getUserMedia({ video: { facingMode: "user" } }) ?? Promise.reject(new Error());
    void asked.then((got) => {
      stream = got;
      if (over) got.getTracks().forEach((track) => track.stop());
      else if (video.current) video.current.srcObject = got;
    }).catch(() => { complain(t("noWebcam")); turn(false); });
    return () => { over = true; be(false); stream?.getTracks().forEach((track) => track.stop()); };
  }, [on]);
  const shoot = () => {
    const from = video.current!, canvas = document.createElement("canvas");
    canvas.width = from.videoWidth; canvas.height = from.videoHeight;
    canvas.getContext("2d")!.drawImage(from, 0, 0);
    canvas.toBlob((blob) => { if (blob) take(blob); turn(false); }, "image/jpeg", 0.95);
  };
  if (!on) return <div><button type="button" onClick={() => { complain(""); turn(true); }}>{t("webcam")}</button>{problem && <Problem text={problem} />}</div>;
  return (
    <div class="webcam">
      <video ref={video} autoplay muted playsinline aria-label={t("webcam")} onPlaying={() => be(true)} />
      <div class="row"><button type="button" disabled={!ready} onClick={shoot}>{t("take")}</button><button type="button" onClick={() => turn(false)}>{t("cancel")}</button></div>
    </div>
  );
}

function Preview({ picture }: { picture: Blob }) {
  const [url, set] = useState("");
  useEffect(() => {
    const made = URL.createObjectURL(picture);
    set(made);
    return () => URL.revokeObjectURL(made);
  }, [picture]);
  return url ? <img class="preview" src={url} alt={t("chosen")} /> : null;
}

/** The server's own bound. */
const MOST_BYTES = 16 << 20;

/** ``into``: whom one more picture is wanted of. */
function Enrol({ done, gallery, into }: { done: () => void; gallery: string; into: { id: string } }) {
  const [id, setId] = useState(""), [name, setName] = useState("");
  const form = useRef<HTMLFormElement>(null);
  useEffect(() => {
    if (!into.id) return;
    setId(into.id);
    setName("");
    say(["", true]);
    form.current?.scrollIntoView({ block: "nearest" });
    file.current?.focus();
  }, [into]);
  const [live, mustLive] = useState(false);
  const [picture, choose] = useState<Blob | null>(null);
  const [busy, work] = useState(false);
  const [said, say] = useState<[string, boolean]>(["", true]);
  const file = useRef<HTMLInputElement>(null);
  const send = async (e: Event) => {
    e.preventDefault();
    if (!picture || busy) return;
    if (picture.size > MOST_BYTES) { say([t("PICTURE_TOO_LARGE"), false]); return; }
    work(true);
    say([t("working"), true]);
    const asked = new URLSearchParams({ name, gallery, ...(live ? { live: "1" } : {}) });
    try {
      const made = await call<{ face: { quality: number }; warnings: string[] }>("POST", `/people/${encodeURIComponent(id)}/faces?${asked}`, picture);
      say([[t("enrolled", number(made.face.quality)), ...made.warnings.map((why) => reason({ reason: why, message: why }))].join(" "), true]);
      // One more of the same person is another picture.
      choose(null);
      if (file.current) file.current.value = "";
      done();
    } catch (error) { say([reason(error as Refusal), false]); }
    work(false);
  };
  const chosen = (blob: Blob | null) => { choose(blob); say(["", true]); };
  const shot = (blob: Blob) => { if (file.current) file.current.value = ""; chosen(blob); };
  return (
    <form ref={form} class="card enrol" onSubmit={send} aria-labelledby="enrol">
      <h2 id="enrol">{t("enrol")}</h2>
      <div class="fields">
        <label>{t("id")} <input name="id" required pattern="[A-Za-z0-9_.@:\-]{1,128}" autocomplete="off" value={id} onInput={(e) => setId(e.currentTarget.value)} /></label>
        <label>{t("name")} <input name="name" autocomplete="off" value={name} onInput={(e) => setName(e.currentTarget.value)} /></label>
        <label>{t("picture")} <input ref={file} name="picture" type="file" accept="image/jpeg,image/png,image/webp" onChange={(e) => chosen(e.currentTarget.files?.[0] ?? null)} /></label>
      </div>
      <div class="row"><Webcam take={shot} />{picture && <Preview picture={picture} />}</div>
      <label><input type="checkbox" checked={live} onChange={(e) => mustLive(e.currentTarget.checked)} /> {t("mustLive")}</label>
      <button class="main" disabled={!picture || !id || busy}>{t("enrol")}</button>
      <p role="status" class={said[1] ? "good" : "problem"}>{said[0]}</p>
    </form>
  );
}

function Receipt({ templates, receipt, close }: { templates: number; receipt: string; close: () => void }) {
  const [url, set] = useState("");
  useEffect(() => {
    const made = URL.createObjectURL(new Blob([receipt], { type: "application/json" }));
    set(made);
    return () => URL.revokeObjectURL(made);
  }, [receipt]);
  return (
    <Dialog title={t("receipt")} close={close}>
      <p>{t("deleted", templates)}</p><pre class="receipt" tabIndex={0}>{receipt}</pre>
      <div class="row"><a class="button" download={`erasure-${Date.now()}.json`} href={url}>{t("copy")}</a><button onClick={close}>{t("close")}</button></div>
    </Dialog>
  );
}

function Card({ person, changed, add, may }: { person: Person; changed: () => void; add: () => void; may: May }) {
  const [open, toggle] = useState(false);
  const [full, fill] = useState<Person | null>(null);
  const [asking, ask] = useState(false);
  const [leaving, leave] = useState<Template | null>(null);
  const [receipt, show] = useState<{ templates: number; receipt: string } | null>(null);
  const [problem, complain] = useState("");
  const path = `/people/${encodeURIComponent(person.id)}`, where = `?gallery=${encodeURIComponent(person.gallery)}`;
  const load = () => call<Person>("GET", path + where).then(fill, (error) => complain(reason(error as Refusal)));
  useEffect(() => { if (open) void load(); }, [person.templates]);
  const erase = async () => {
    ask(false);
    try { show(await call("DELETE", path + where)); } catch (error) { complain(reason(error as Refusal)); }
  };
  const take = async (what: string) => {
    leave(null);
    try { await call("DELETE", what + where); complain(""); await load(); changed(); } catch (error) { complain(reason(error as Refusal)); }
  };
  const whom = person.display_name || person.id;
  return (
    <li class="card" data-subject={person.id}>
      <h2>{whom}</h2>
      <p class="small">{person.id}</p>
      {problem && <Problem text={problem} />}
      <div class="row">
        <button aria-expanded={open} onClick={() => { toggle(!open); if (!open) void load(); }}>{t("faces", person.templates)}</button>
        {may.enroll && <button onClick={add}>{t("addFace")}</button>}
        <a class="button" href={`/api${path}/copy${where}`} download={`${person.id}.zip`} title={t("exportHint")}>{t("export")}</a>
        {may.delete && <button class="danger" onClick={() => ask(true)}>{t("delete")}</button>}
      </div>
      {open && full?.faces && <ul class="faces">{full.faces.map((face) => (
        <li key={face.id}><meter min="0" max="1" value={face.quality} aria-label={t("quality")} /> <span>{t("quality")} {number(face.quality)} · {t("trust")} {number(face.ood)} · {when(face.time)}</span>
          {may.delete && <button class="danger" onClick={() => leave(face)} aria-label={`${t("delete")} ${when(face.time)}`}>{t("delete")}</button>}</li>))}
        {full.corrections?.map((one) => (
          <li key={one.id}><span>{t(one.is_not ? "saidNot" : "saidIs")} · {when(one.time)}</span>
            {may.correct && <button onClick={() => take(`/corrections/${one.id}`)} aria-label={`${t("undo")} ${when(one.time)}`}>{t("undo")}</button>}</li>))}</ul>}
      {asking && <Ask title={t("deleteAll", whom)} yes={erase} close={() => ask(false)} />}
      {leaving && <Ask title={t("deleteFace", when(leaving.time), whom)} yes={() => take(`/templates/${leaving.id}`)} close={() => leave(null)} />}
      {receipt && <Receipt {...receipt} close={() => { show(null); changed(); document.getElementById("head")?.focus(); }} />}
    </li>
  );
}

export function People({ may }: { may: May }) {
  const [typed, type] = useState(""), [place, go] = useState("");
  const q = useSettled(typed), gallery = useSettled(place);
  const [most, show] = useState(PAGE), [into, add] = useState({ id: "" });
  useEffect(() => show(PAGE), [q, gallery]);
  const [found, problem, again] = useTold<Found>(`/people?q=${encodeURIComponent(q)}&gallery=${encodeURIComponent(gallery)}&most=${most}`, 0);
  const people = found?.people;
  return (
    <section aria-labelledby="head">
      <Heading>{t("people")}</Heading>
      {may.enroll && <Enrol done={again} gallery={gallery} into={into} />}
      <div class="row filters">
        <label>{t("search")} <input type="search" value={typed} onInput={(e) => type(e.currentTarget.value)} /></label>
        <label>{t("gallery")} <input value={place} placeholder="default" onInput={(e) => go(e.currentTarget.value)} /></label>
      </div>
      {problem && <Problem text={problem} />}
      {!people && !problem && <Waiting />}
      {people && !people.length && !problem && <p>{t("nobodyFound")}</p>}
      <ul class="people">{(people ?? []).map((person) => <Card key={person.id} person={person} changed={again} may={may} add={() => add({ id: person.id })} />)}</ul>
      {found?.more && <div class="row"><span role="status" class="small">{t("peopleOf", found.people.length)}</span>{most < MOST && <button onClick={() => show(most + PAGE)}>{t("morePeople")}</button>}</div>}
    </section>
  );
}
