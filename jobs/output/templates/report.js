const PAGE = 20;
const opened = new Map(); // The chunks read so far.
let index, shown, page = 0;

/** Whether one of the chosen editors has the chosen failure in record i. */
function fails(i, editors, failure) {
  if (failure === "") return true;
  if (failure === "none") return editors.every((e) => !e.edited || e.failures[i] === 0);
  return editors.some((e) => e.failures[i] > 0 && (e.failures[i] >> failure) & 1);
}

function differs(i) {
  const found = index.editors.filter((e) => e.edited && e.failures[i] >= 0);
  return found.some((e) => e.failures[i] !== found[0].failures[i]);
}

function filter() {
  const { editor, failure, relation, words, differ } = document.getElementById("filters").elements;
  const all = index.editors;
  const editors = editor.value === "" ? all : [all[editor.value]];
  const sought = words.value.trim().toLowerCase();
  shown = [];
  for (let i = 0; i < index.case_id.length; i++) {
    if (relation.value !== "" && index.relation[i] !== Number(relation.value)) continue;
    if (editor.value !== "" && editors[0].failures[i] < 0) continue;
    if (!fails(i, editors, failure.value)) continue;
    if (differ.checked && !differs(i)) continue;
    if (sought !== "" && !index.sought[i].includes(sought)) continue;
    shown.push(i);
  }
  page = 0;
  draw();
}

function draw() {
  const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1);
  const cards = shown.slice(page * PAGE, (page + 1) * PAGE).map(card);
  document.getElementById("list").replaceChildren(...cards);
  const counts = [shown.length, index.case_id.length].map((n) => n.toLocaleString("en"));
  document.getElementById("count").textContent = `${counts[0]} of ${counts[1]} records`;
  document.getElementById("where").textContent = `page ${page + 1} of ${last + 1}`;
  document.getElementById("previous").disabled = page === 0;
  document.getElementById("next").disabled = page === last;
}

function card(i) {
  const chips = index.editors.filter((e) => e.failures[i] >= 0).map((e) => {
    const scores = index.scores.filter((s) => e[s][i] !== null);
    const numbers = scores.map((s) => `${s} ${Math.round(e[s][i] * 100)}`).join(" ");
    const found = index.failures.filter((_, bit) => (e.failures[i] >> bit) & 1).join(", ");
    const failure = found === "" ? null : element("span", { class: "bad" }, " ✗ ", found);
    return element("span", {}, element("b", {}, e.label), " ", numbers, failure);
  });
  const made = element(
    "details", { class: "record" },
    element(
      "summary", {}, sentence(i), " → ", element("b", {}, index.target_new[i] ?? ""),
      index.target_true[i] === null ? null : ` (${index.target_true[i]})`,
      element("span", { class: "soft" }, ` case ${index.case_id[i]} `,
        index.relations[index.relation[i]] ?? ""),
      element("div", { class: "chips" }, ...chips),
    ),
  );
  made.addEventListener("toggle", () => open(made, i), { once: true });
  return made;
}

function sentence(i) {
  return (index.prompt[i] ?? "").replace("{}", () => index.subject[i] ?? "");
}

async function open(made, i) {
  const number = Math.floor(i / index.chunk);
  if (!opened.has(number)) opened.set(number, unpack(`chunk-${number}`));
  const record = (await opened.get(number))[i % index.chunk];
  const own = index.editors.flatMap((e, place) =>
    record[place] === null ? [] : [{ label: e.label, ...record[place] }]);
  made.append(element(
    "div", {}, ...errors(own), probabilities(i, record, own), probes(own), ...texts(i, own),
    health(own),
  ));
}

function errors(own) {
  return own.filter((e) => e.error !== null)
    .map((e) => element("p", { class: "bad" }, `${e.label}: ${e.error}`));
}

/** A table of both targets' probabilities: rows are prompts, columns editors. */
function probabilities(i, record, own) {
  const rows = [];
  const prompts = {
    rewrite: [sentence(i)],
    paraphrase: record.paraphrase_prompts ?? [],
    neighborhood: record.neighborhood_prompts ?? [],
  };
  for (const [kind, words] of Object.entries(prompts)) {
    const count = Math.max(0, ...own.map((e) => (e[`${kind}_nll_new`] ?? []).length));
    for (let p = 0; p < count; p++) {
      rows.push(element(
        "tr", {}, element("td", {}, words[p] ?? "", element("small", {}, kind)),
        ...own.map((e) => probability(e, kind, p)),
      ));
    }
  }
  const head = element(
    "tr", {}, element("th", {}, "p(new) against p(true)"),
    ...own.map((e) => element("th", {}, e.label)),
  );
  return element("div", { class: "scroll" }, element(
    "table", { class: "probabilities" }, element("thead", {}, head), element("tbody", {}, ...rows),
  ));
}

/** A table of what is said to probes: rows are questions, columns editors. */
function probes(own) {
  const asked = own.map((e) => e.probes ?? []).find((some) => some.length > 0);
  if (asked === undefined) return null;
  const rows = asked.map((probe, p) => element(
    "tr", {},
    element("td", {}, probe.prompt, element("small", {}, `${probe.set}, ${probe.role}: ${probe.answers.join(" / ")}`)),
    ...own.map((e) => element("td", {}, ...answered((e.probes ?? [])[p]))),
  ));
  const head = element("tr", {}, element("th", {}, "Probes"), ...own.map((e) => element("th", {}, e.label)));
  return element("div", { class: "scroll" }, element(
    "table", { class: "probabilities" }, element("thead", {}, head), element("tbody", {}, ...rows),
  ));
}

/** The share of right tokens, and what is said. */
function answered(probe) {
  if (probe === undefined) return ["–"];
  return [share(probe.accuracy), ...spoken(probe.greedy, probe.wild)];
}

function spoken(said, wild) {
  return [["says", said], ["WILD", wild]]
    .filter(([, text]) => text !== undefined && text !== null)
    .map(([how, text]) => element("small", {}, `${how} “${text}”`));
}

function probability(e, kind, p) {
  const [fresh, old] = ["new", "true"].map((t) => (e[`${kind}_nll_${t}`] ?? [])[p] ?? null);
  const words = spoken((e[`${kind}_greedy`] ?? [])[p], (e[`${kind}_wild`] ?? [])[p]);
  if (fresh === null && old === null) return element("td", {}, ...(words.length ? words : ["–"]));
  const good = kind === "neighborhood" ? old > fresh : fresh > old;
  const verdict = old === null || fresh === null ? null
    : element("span", { class: good ? "good" : "bad" }, good ? " ✓" : " ✗");
  return element("td", {}, `${share(fresh)} : ${share(old)}`, verdict, ...words);
}

function share(value) {
  if (value === null) return "–";
  return value >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(0);
}

/** Generations side by side (Figure 6), the targets marked. */
function texts(i, own) {
  const count = Math.max(0, ...own.map((e) => (e.texts ?? []).length));
  return Array.from({ length: count }, (_, t) => element(
    "div", {}, element("h3", {}, `Text ${t + 1}`),
    element("div", { class: "texts" }, ...own.filter((e) => (e.texts ?? []).length > t).map((e) =>
      element("div", {}, element("b", {}, e.label),
        element("p", {}, ...marked(e.texts[t], index.target_new[i]))))),
  ));
}

function marked(text, target) {
  if (!target) return [text];
  return text.split(target).flatMap((part, n) => (n ? [element("mark", {}, target), part] : [part]));
}

function health(own) {
  const names = Object.keys(own[0] ?? {}).filter((k) => k.startsWith("edit_") || k === "GE" || k === "RS");
  const lines = own.map((e) => {
    const known = names.filter((name) => e[name] !== null);
    const numbers = known.map((n) => `${n.replace("edit_", "").replace("_", " ")} ${Number(e[n].toPrecision(3))}`);
    return numbers.length ? element("p", { class: "soft" }, `${e.label}: ${numbers.join(" · ")}`) : null;
  });
  return element("div", {}, ...lines);
}

function fill(name, words) {
  const select = document.getElementById("filters").elements[name];
  select.append(...words.map((word, i) => element("option", { value: i }, word)));
  return select;
}

async function start() {
  index = await unpack("index");
  index.sought = index.case_id.map((id, i) =>
    `${id} ${sentence(i)} ${index.target_new[i]} ${index.target_true[i]}`.toLowerCase());
  fill("editor", index.editors.map((e) => e.label));
  fill("failure", index.failures).append(element("option", { value: "none" }, "no failure"));
  fill("relation", index.relations);
  const filters = document.getElementById("filters");
  filters.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    document.getElementById(id).addEventListener("click", () => { page += step; draw(); });
  }
  filter();
}

start();
