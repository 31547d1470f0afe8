import { Component } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { call, loggedOut, socket, type Event_, type May, type People, type Stream } from "./api";
import { Heading, number, Problem, useSettled, useTold, Waiting, when } from "./parts";
import { KINDS, kind as kindText, reason, t, type Kind, type Refusal } from "./words";

const AGAIN_MS = 2000;
/** So many are held while new ones come; the button goes on from there. */
const MOST = 5000;
/** What happens meanwhile is shown together: each time the whole list is looked through. */
const TOGETHER_MS = 100;

/** Newest first, each once. */
function merged(now: Event_[], found: Event_[]): Event_[] {
  const held = new Set(now.map((one) => one.sequence));
  const fresh = found.filter((one) => !held.has(one.sequence));
  return fresh.length ? [...fresh, ...now].sort((a, b) => b.sequence - a.sequence) : now;
}

/** Rows that nothing has changed for are left as they are, however many stand beside a new one. */
class Row extends Component<{ event: Event_; may: May; hide: boolean }> {
  override shouldComponentUpdate(next: { event: Event_; may: May; hide: boolean }) {
    return next.event !== this.props.event || next.may !== this.props.may || next.hide !== this.props.hide;
  }
  override render() { return <EventRow {...this.props} />; }
}

function Picture({ event, whom }: { event: Event_; whom: string }) {
  const [gone, lose] = useState(!event.picture);
  if (gone) return null;
  return <img loading="lazy" width="112" height="112" src={`/api/events/${event.sequence}/picture`} alt={t("pictureOf", whom)} onError={() => lose(true)} />;
}

function EventRow({ event, may, hide }: { event: Event_; may: May; hide: boolean }) {
  const [known, know] = useState(event.known ?? false);
  const [note, say] = useState("");
  const [undo, offer] = useState("");
  const [asking, ask] = useState(false);
  const whom = event.display_name || event.name || t("nobody");
  const correct = async (body: object): Promise<Refusal | null> => {
    try {
      const done = await call<{ id: string; subject: string; is_not: boolean }>("POST", `/events/${event.sequence}/correct`, body);
      offer(done.id);
      say(done.is_not ? t("corrected", whom) : t("correctedIs", done.subject));
      ask(false);
    } catch (error) { return error as Refusal; }
    return null;
  };
  const isNot = async () => { const refused = await correct({}); if (refused) say(reason(refused)); };
  const takeBack = async () => {
    try { await call("DELETE", `/corrections/${undo}?gallery=${encodeURIComponent(event.gallery)}`); offer(""); say(""); }
    catch (error) { say(reason(error as Refusal)); }
  };
  const acknowledge = async () => {
    try { await call("POST", `/events/${event.sequence}/acknowledge`); know(true); } catch (error) { say(reason(error as Refusal)); }
  };
  if (known && hide) return null;
  const about = event.looks === undefined ? [event.pool, event.message].filter(Boolean).join(": ") : whom;
  const live = event.live === "LIVE" ? t("liveFace") : event.live === "SPOOF" ? t("spoof") : "";
  return (
    <li class={`event ${known ? "known" : ""}`} data-sequence={event.sequence} data-kind={event.kind}>
      <Picture event={event} whom={whom} />
      <div class="grow">
        <h2><span class={`badge ${event.kind}`}>{kindText(event.kind)}</span> {about}{event.rule && ` · ${event.rule}`}</h2>
        <p class="small">{when(event.time)}{event.source && ` · ${event.source}`}{event.camera_time ? ` · ${t("cameraTime")} ${when(event.camera_time)}` : ""}</p>
        {!!event.looks && <p class="small">{t("looks", event.looks)} · {event.similarity != null && `${t("similarity")} ${number(event.similarity)} · `}{event.ood != null && `${t("trust")} ${number(event.ood)} · `}{t("forSeconds", number(event.seconds, 1))}{live && ` · ${live}`}</p>}
        <p role="status" class="small">{note}</p>
      </div>
      <div class="row actions">
        {!known ? <button onClick={acknowledge}>{t("acknowledge")}</button> : <span class="small">✓ {t("acknowledged")}</span>}
        {may.correct && event.picture && !undo && event.name && <button onClick={isNot}>{t("notHim", whom)}</button>}
        {may.correct && event.picture && !asking && !undo && <button onClick={() => ask(true)}>{t("isHim")}</button>}
        {undo && <button onClick={takeBack}>{t("undo")}</button>}
      </div>
      {asking && <Whose list={may.people} gallery={event.gallery} tell={(subject, create) => correct({ subject, create })} close={() => ask(false)} />}
    </li>
  );
}

/** Which subject it is: of those who are known, or somebody new, which is asked once more. */
function Whose({ tell, close, list, gallery }: { tell: (who: string, create: boolean) => Promise<Refusal | null>; close: () => void; list: boolean; gallery: string }) {
  const [who, name] = useState(""), [problem, complain] = useState("");
  const [unknown, offer] = useState("");
  const asked = useSettled(who), id = useId(), field = useRef<HTMLInputElement>(null);
  useEffect(() => field.current?.focus(), []);
  const [known] = useTold<People>(list ? `/people?q=${encodeURIComponent(asked)}&gallery=${encodeURIComponent(gallery)}` : "/session", 0);
  const send = async (create: boolean) => {
    const refused = await tell(who, create);
    offer(refused?.reason === "SUBJECT_NOT_FOUND" ? who : "");
    complain(refused ? (refused.reason === "SUBJECT_NOT_FOUND" ? t("nobodyCalled", who) : reason(refused)) : "");
  };
  return (
    <form class="row" onSubmit={(e) => { e.preventDefault(); void send(false); }}>
      <label>{t("whoIsIt")} <input required ref={field} list={id} value={who} onInput={(e) => { name(e.currentTarget.value); offer(""); complain(""); }} /></label>
      <datalist id={id}>{known?.people?.map((one) => <option key={one.id} value={one.id}>{one.display_name}</option>)}</datalist>
      <button>{t("save")}</button><button type="button" onClick={close}>{t("cancel")}</button>
      {problem && <Problem text={problem} />}
      {unknown && <button type="button" onClick={() => send(true)}>{t("enrolNew", unknown)}</button>}
    </form>
  );
}

export function Events({ may }: { may: May }) {
  const [kind, choose] = useState("");
  const [typed, type] = useState("");
  const source = useSettled(typed);
  const [open, only] = useState(false);
  const [events, set] = useState<Event_[]>([]);
  const [before, older] = useState(0);
  const [asked, answered] = useState("?");
  const [problem, complain] = useState("");
  const [lost, lose] = useState(false);
  const [streams] = useTold<Stream[]>(may.view ? "/streams" : "/session", 0);
  const end = useRef<HTMLButtonElement>(null);
  const current = useRef("?"), asking = useRef(new Set<string>());
  /** Whether the newest page has come, and the newest event that is held. */
  const begun = useRef(false), newest = useRef(0);
  newest.current = events[0]?.sequence ?? 0;
  const filter = `${kind ? `&kind=${kind}` : ""}${source ? `&source=${encodeURIComponent(source)}` : ""}`;
  /** The page before ``at`` (0: the newest). ``reach``: of the newest page, what is the newest that was held when nobody listened. */
  const page = async (at: number, reach = 0) => {
    const question = `${at}${filter}`;
    if (current.current !== filter || asking.current.has(question)) return;
    asking.current.add(question);
    try {
      const found = await call<{ events: Event_[]; before: number }>("GET", `/events?before=${at}${filter}`);
      if (current.current === filter) {
        // More has happened than the page shows: what was held begins behind a gap, and is asked for again.
        const gap = reach > 0 && found.before > 0 && (found.events.at(-1)?.sequence ?? 0) > reach;
        set((now) => merged(gap ? now.filter((one) => one.sequence > reach) : now, found.events));
        if (at || !reach || gap) older(found.before);
        begun.current ||= at === 0;
        answered(filter);
        complain("");
      }
    } catch (error) {
      if (current.current === filter) {
        complain(reason(error as Refusal));
        // For what is older there is the button.
        if (!at) window.setTimeout(() => void page(at, reach), AGAIN_MS);
      }
    }
    asking.current.delete(question);
  };
  useEffect(() => {
    let over = false, timer = 0, soon = 0, news: WebSocket, heard: Event_[] = [];
    current.current = filter;
    begun.current = false;
    set([]);
    older(0);
    const show = () => {
      const fresh = heard;
      heard = [];
      soon = 0;
      set((now) => {
        const all = merged(now, fresh), kept = all.slice(0, MOST);
        // What makes room is what is asked for next: older ones never stand behind a gap.
        if (kept.length < all.length) older(kept.at(-1)!.sequence);
        return kept;
      });
    };
    const listen = () => {
      news = socket("/events/live");
      news.onmessage = (message) => {
        const event = JSON.parse(message.data as string) as Event_;
        if (!event.sequence) {
          lose(false);
          // From here on all is heard; what was before, or while nobody listened, is in the history.
          void page(0, begun.current ? newest.current : 0);
          return;
        }
        if ((!kind || event.kind === kind) && (!source || event.source === source)) {
          heard.push(event);
          soon ||= window.setTimeout(show, TOGETHER_MS);
        }
      };
      news.onclose = ({ code }) => {
        if (over) return;
        if (code === 4401) { loggedOut(); return; }
        lose(true);
        // A session that has ended is no lost connection: whoever asks hears which it is.
        timer = window.setTimeout(() => { void call("GET", "/session").catch(() => null).then(() => { if (!over) listen(); }); }, AGAIN_MS);
      };
    };
    listen();
    return () => { over = true; current.current = "?"; clearTimeout(timer); clearTimeout(soon); news.close(); };
  }, [filter]);
  useEffect(() => {
    // Scrolling to the end asks for what is older; the button is there for everybody else.
    const seen = new IntersectionObserver((entries) => { if (entries[0]?.isIntersecting && before && events.length < MOST) void page(before); });
    if (end.current) seen.observe(end.current);
    return () => seen.disconnect();
  }, [before, filter, events.length >= MOST]);
  const busy = asked !== filter || typed !== source;
  return (
    <section aria-labelledby="head">
      <Heading>{t("events")}</Heading>
      <div class="row filters">
        <label>{t("filter")} <select value={kind} onChange={(e) => choose(e.currentTarget.value)}>
          <option value="">{t("all")}</option>{(Object.keys(KINDS) as Kind[]).map((one) => <option key={one} value={one}>{kindText(one)}</option>)}
        </select></label>
        <label>{t("source")} <input type="search" list="sources" value={typed} onInput={(e) => type(e.currentTarget.value)} /></label>
        <datalist id="sources">{Array.isArray(streams) && [...new Set(streams.map((one) => one.source))].map((one) => <option key={one} value={one} />)}</datalist>
        <label><input type="checkbox" checked={open} onChange={(e) => only(e.currentTarget.checked)} /> {t("onlyOpen")}</label>
      </div>
      {(problem || lost) && <Problem text={problem || t("lost")} />}
      {busy && !events.length && !problem && !lost && <Waiting />}
      {!busy && !events.length && !problem && <p>{t("none")}</p>}
      <ol class="events" aria-busy={busy}>{events.map((event) => <Row key={event.sequence} event={event} may={may} hide={open} />)}</ol>
      {before > 0 && <button ref={end} onClick={() => page(before)}>{t("more")}</button>}
    </section>
  );
}
