/** What several views are made of. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { call } from "./api";
import { language, reason, t, type Refusal } from "./words";

export const number = (value: number | null | undefined, digits = 2) => (value == null ? "–" : value.toFixed(digits));
/** As the browser's country writes, in the language that is chosen. */
const locale = () => { const own = navigator.languages.find((one) => one.startsWith(language())); return own ?? (language() === "zh" ? "zh-CN" : "en-GB"); };
export const when = (seconds: number | null | undefined) =>
  (seconds == null ? "–" : new Date(seconds * 1000).toLocaleString(locale(), { dateStyle: "medium", timeStyle: "medium" }));

/** After a question that failed. */
const AGAIN_MS = 5000;

/** What the console answers, asked again every so many milliseconds (0 = once it has answered), a complaint, and a way to ask now. */
export function useTold<T>(path: string, every: number): [T | null, string, () => void] {
  const [value, set] = useState<T | null>(null);
  const [problem, complain] = useState("");
  const [round, again] = useState(0);
  useEffect(() => {
    let over = false, timer = 0;
    const ask = async () => {
      let again = every;
      try { const found = await call<T>("GET", path); if (!over) { set(found); complain(""); } }
      catch (error) { if (!over) complain(reason(error as Refusal)); again ||= AGAIN_MS; }
      if (!over && again) timer = window.setTimeout(ask, again);
    };
    void ask();
    return () => { over = true; clearTimeout(timer); };
  }, [path, every, round]);
  return [value, problem, () => again((n) => n + 1)];
}

/** A value that is typed, once the typing has paused. */
export function useSettled(value: string): string {
  const [settled, settle] = useState(value);
  useEffect(() => {
    const timer = window.setTimeout(() => settle(value), 300);
    return () => clearTimeout(timer);
  }, [value]);
  return settled;
}

export const Heading = ({ children }: { children: ComponentChildren }) => <h1 id="head" tabIndex={-1}>{children}</h1>;
export const Waiting = () => <p class="small" role="status">{t("working")}</p>;
export const Problem = ({ text }: { text: string }) => <p class="problem" role="alert">{text}</p>;

export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => { box.current?.showModal(); }, []);
  return <dialog ref={box} aria-label={title} onClose={close}><h2>{title}</h2>{children}</dialog>;
}

/** Asks before something is deleted; whoever merely presses Enter has deleted nothing. */
export function Ask({ title, yes, close }: { title: string; yes: () => void; close: () => void }) {
  return <Dialog title={title} close={close}><div class="row"><button autofocus onClick={close}>{t("cancel")}</button><button class="danger" onClick={yes}>{t("delete")}</button></div></Dialog>;
}
