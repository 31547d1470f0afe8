import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { call, whenLoggedOut, type May } from "./api";
import { Events } from "./events";
import { Live } from "./live";
import { Problem } from "./parts";
import { People } from "./people";
import { SystemView } from "./system";
import { language, reason, speak, t, type Refusal } from "./words";
import "./style.css";

const VIEWS = ["live", "events", "people", "system"] as const;
type View = (typeof VIEWS)[number];
const shown = (view: View, may: May) => ({ live: may.view, events: may.events, people: may.people, system: true })[view];

function Words() {
  const [, again] = useState(0);
  const theme = () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    again((n) => n + 1);
  };
  const other = language() === "en" ? "zh" : "en";
  return <><button class="plain" lang={other === "zh" ? "zh-CN" : "en"} onClick={() => { speak(other); spoken(); }}>{t("language")}</button><button class="plain" onClick={theme}>{t("theme")}</button></>;
}

function Login({ enter, ended }: { enter: (may: May) => void; ended: boolean }) {
  const [key, type] = useState(""), [problem, complain] = useState("");
  const send = async (e: Event) => {
    e.preventDefault();
    complain("");
    try { enter((await call<{ may: May }>("POST", "/login", { key })).may); } catch (error) { complain(reason(error as Refusal)); }
  };
  return (
    <main class="login"><form class="card" onSubmit={send}>
      <h1>facelane</h1>
      {ended && !problem && <p role="status">{t("ended")}</p>}
      <label>{t("key")} <input name="key" type="password" autocomplete="off" aria-describedby="hint" value={key} onInput={(e) => type(e.currentTarget.value)} /></label>
      <p id="hint" class="small">{t("keyHint")}</p>
      <div class="row"><button class="main">{t("login")}</button><Words /></div>
      {problem && <Problem text={problem} />}
    </form></main>
  );
}

let spoken = () => {};

function App() {
  const [may, enter] = useState<May | null | undefined>(undefined);
  const [hash, go] = useState(location.hash.slice(1));
  const [, again] = useState(0);
  const [ended, end] = useState(false);
  spoken = () => again((n) => n + 1);
  useEffect(() => {
    whenLoggedOut(() => { enter((was) => { if (was) end(true); return null; }); });
    call<{ may: May }>("GET", "/session").then((found) => enter(found.may), () => enter(null));
    const moved = () => {
      go(location.hash.slice(1));
      // Whoever does not see the page hears where he is.
      requestAnimationFrame(() => document.getElementById("head")?.focus());
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const views = VIEWS.filter((view) => may && shown(view, may));
  const view = views.find((one) => one === hash) ?? views[0];
  useEffect(() => { document.title = may && view ? `${t(view)} · facelane` : "facelane"; });
  if (may === undefined) return null;
  if (may === null) return <Login enter={(found) => { end(false); enter(found); }} ended={ended} />;
  const leave = () => call("POST", "/logout").catch(() => null).then(() => enter(null));
  return (
    <>
      <a class="skip" href="#content" onClick={(e) => { e.preventDefault(); document.getElementById("content")?.focus(); }}>{t("skip")}</a>
      <header><strong>facelane</strong>
        <nav aria-label="facelane">{views.map((one) => <a key={one} href={`#${one}`} aria-current={one === view ? "page" : undefined}>{t(one)}</a>)}</nav>
        <div class="row"><Words /><button class="plain" onClick={leave}>{t("logout")}</button></div>
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
