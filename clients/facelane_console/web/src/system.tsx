import { useEffect, useRef } from "preact/hooks";
import type { System } from "./api";
import { Heading, number, Problem, useTold, Waiting } from "./parts";
import { state, t } from "./words";

const EVERY_MS = 2000, KEPT = 60;
type Past = { rate: number[]; age: number[]; drops: number[]; dropped: number };

function Plot({ values, name }: { values: number[]; name: string }) {
  const top = Math.max(...values, 1e-6);
  const points = values.map((value, n) => `${((KEPT - values.length + n) / (KEPT - 1)) * 120},${28 - (value / top) * 26}`).join(" ");
  if (values.length < 2) return <svg class="plot" viewBox="0 0 120 30" aria-hidden="true" />;
  return <svg class="plot" viewBox="0 0 120 30" role="img" aria-label={`${name}: ${number(values.at(-1))}`}><polyline points={points} /></svg>;
}

function Table({ name, heads, children }: { name: string; heads: string[]; children: preact.ComponentChildren }) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={name}><table><caption>{name}</caption>
      <thead><tr>{heads.map((head) => <th scope="col" key={head}>{head}</th>)}</tr></thead><tbody>{children}</tbody></table></div>
  );
}

export function SystemView() {
  const [told, problem] = useTold<System>("/system", EVERY_MS);
  const past = useRef(new Map<string, Past>());
  const seen = useRef<System | null>(null);
  if (told && seen.current !== told) {
    // Once for each answer, before it is shown.
    seen.current = told;
    for (const camera of told.cameras) {
      const had = past.current.get(camera.stream) ?? { rate: [], age: [], drops: [], dropped: camera.drops };
      const add = (values: number[], value: number) => [...values, value].slice(-KEPT);
      past.current.set(camera.stream, { rate: add(had.rate, camera.results), age: add(had.age, camera.age * 1000), drops: add(had.drops, camera.drops - had.dropped), dropped: camera.drops });
    }
    for (const stream of [...past.current.keys()]) if (!told.cameras.some((one) => one.stream === stream)) past.current.delete(stream);
  }
  useEffect(() => () => past.current.clear(), []);
  if (!told) return <section aria-labelledby="head"><Heading>{t("system")}</Heading>{problem ? <Problem text={problem} /> : <Waiting />}</section>;
  return (
    <section aria-labelledby="head">
      <Heading>{t("system")}</Heading>
      {problem && <Problem text={problem} />}
      <dl class="figures">
        <div><dt>{t("health")}</dt><dd class={told.health === "SERVING" ? "good" : "problem"}>{state(told.health)}</dd></div>
        <div><dt>{t("cameras")}</dt><dd>{told.streams}</dd></div>
        <div title={t("loadHint")}><dt>{t("load")}</dt><dd>{told.load === null ? "–" : `${Math.round(told.load * 100)} %`}</dd></div>
        <div><dt>facelane</dt><dd>{told.version}</dd></div>
      </dl>
      {told.draining && <Problem text={t("draining")} />}
      {told.degradations.map(([part, cause, text]) => <Problem key={part} text={`${t("amiss")}: ${part} ${cause}: ${text}`} />)}
      <Table name={t("cameras")} heads={[t("source"), t("encoding"), t("rate"), t("age"), t("drops"), t("tracks"), t("watchers")]}>
        {told.cameras.map((camera) => { const had = past.current.get(camera.stream); return (
          <tr key={camera.stream}><th scope="row">{camera.source || camera.stream}</th><td>{camera.encoding ?? "–"}</td><td class="plotted"><span>{number(camera.results, 1)}</span> <Plot name={t("rate")} values={had?.rate ?? []} /></td>
            <td class="plotted"><span>{Math.round(camera.age * 1000)} ms</span> <Plot name={t("age")} values={had?.age ?? []} /></td><td class="plotted"><span>{camera.drops}</span> <Plot name={t("drops")} values={had?.drops ?? []} /></td><td>{camera.tracks}</td><td>{camera.watchers}</td></tr>); })}
      </Table>
      <Table name={t("pools")} heads={[t("worker"), t("models"), t("state"), t("device"), t("memory"), t("restarts"), t("loss"), t("queued"), t("failed")]}>
        {told.pools.flatMap((pool) => pool.workers.map((worker) => (
          <tr key={worker.id}><th scope="row">{worker.id}</th><td>{pool.model}</td><td class={worker.state === "READY" ? "good" : "problem"}>{state(worker.state)}</td><td>{worker.device}</td><td>{pool.budget ? t("budget", worker.mib, pool.budget) : `${worker.mib} MiB`}</td><td>{worker.restarts}</td><td>{worker.last_loss || "–"}</td><td>{pool.queued}</td><td>{pool.failed}</td></tr>)))}
      </Table>
      {!!told.shards.length && <Table name={t("shards")} heads={[t("shard"), t("state"), t("cameras"), t("restarts"), t("loss")]}>
        {told.shards.map(([shard, lives, streams, restarts, loss]) => (
          <tr key={shard}><th scope="row">{shard}</th><td class={lives === "READY" ? "good" : "problem"}>{state(lives)}</td><td>{streams}</td><td>{restarts}</td><td>{loss || "–"}</td></tr>))}
      </Table>}
    </section>
  );
}
