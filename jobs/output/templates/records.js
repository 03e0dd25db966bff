const PAGE = 20;
const opened = new Map(); // The chunks read so far.
let index, shown, page = 0, current = -1;

const form = () => document.getElementById("filters").elements;
const chosenEditors = () => index.editors.filter((_, i) => form()[`show-${i}`].checked);

/** Whether one of the editors has the chosen failure in record i. */
function fails(i, editors, failure) {
  if (failure === "") return true;
  if (failure === "none") return editors.every((e) => !e.edited || e.failures[i] === 0);
  return editors.some((e) => e.failures[i] > 0 && (e.failures[i] >> index.failures.indexOf(failure)) & 1);
}

function differs(i) {
  const found = index.editors.filter((e) => e.edited && e.failures[i] >= 0);
  return found.some((e) => e.failures[i] !== found[0].failures[i]);
}

/** Whether a record has all words, in any order; `case:N` is that record alone. */
function matches(i, words) {
  return words.every((word) => word.startsWith("case:")
    ? String(index.case_id[i]) === word.slice(5) : index.sought[i].includes(word));
}

/** What a sort compares: a number of record i, or null, which comes last. */
function keyOf(sort) {
  const [what, name] = sort.split(" ");
  const of = chosenEditors().filter((e) => e.edited)[0] ?? index.editors[0];
  const before = index.editors.find((e) => !e.edited);
  if (what === "differ") {
    const edited = index.editors.filter((e) => e.edited);
    return (i) => -new Set(edited.map((e) => e.failures[i])).size;
  }
  if (what === "change" && before) {
    return (i) => (of[name][i] === null || before[name][i] === null ? null : of[name][i] - before[name][i]);
  }
  if (what === "high") return (i) => (of[name][i] === null ? null : -Math.abs(of[name][i]));
  return (i) => of[name][i];
}

function filter() {
  const { editor, failure, relation, words, differ, sort } = form();
  const editors = editor.value === "" ? index.editors : index.editors.filter((e) => e.label === editor.value);
  const sought = words.value.trim().toLowerCase().split(/\s+/).filter((word) => word !== "");
  shown = [];
  for (let i = 0; i < index.case_id.length; i++) {
    if (relation.value !== "" && index.relations[index.relation[i]] !== relation.value) continue;
    if (editor.value !== "" && editors[0].failures[i] < 0) continue;
    if (!fails(i, editors, failure.value)) continue;
    if (differ.checked && !differs(i)) continue;
    if (!matches(i, sought)) continue;
    shown.push(i);
  }
  if (sort.value !== "") {
    const key = keyOf(sort.value);
    const keys = new Map(shown.map((i) => [i, key(i) ?? Infinity]));
    shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  }
}

/** The state of the browser as the end of the page's address, and back. */
function remember() {
  const state = new URLSearchParams();
  for (const name of ["editor", "failure", "relation", "sort", "words"]) {
    if (form()[name].value !== "") state.set(name, form()[name].value);
  }
  if (form().differ.checked) state.set("differ", "yes");
  const editors = chosenEditors().map((e) => e.label);
  if (editors.join("\n") !== index.shown.join("\n")) editors.forEach((label) => state.append("show", label));
  if (page > 0) state.set("page", page + 1);
  const text = state.toString();
  history.replaceState(null, "", text === "" ? "#records" : `#records?${text}`);
}

function recall() {
  if (!location.hash.startsWith("#records?")) return false;
  const state = new URLSearchParams(location.hash.slice(9));
  for (const name of ["editor", "failure", "relation", "sort", "words"]) {
    form()[name].value = state.get(name) ?? "";
  }
  form().differ.checked = state.has("differ");
  // Whose failures are asked for is shown as well.
  const show = state.has("show") ? state.getAll("show") : [...index.shown, state.get("editor")];
  index.editors.forEach((e, i) => { form()[`show-${i}`].checked = show.includes(e.label); });
  filter();
  page = Math.max(0, Number(state.get("page") ?? 1) - 1);
  drawRecords();
  document.getElementById("browser").scrollIntoView();
  if (shown.length === 1) open(0);
  return true;
}

function changed() {
  page = 0;
  filter();
  remember();
  drawRecords();
}

function turn(step) {
  page += step;
  remember();
  drawRecords();
  document.getElementById("browser").scrollIntoView();
}

function drawRecords() {
  current = -1;
  const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1);
  page = Math.min(page, last);
  const cards = shown.slice(page * PAGE, (page + 1) * PAGE).map(card);
  document.getElementById("list").replaceChildren(...cards);
  const counts = [shown.length, index.case_id.length].map((n) => n.toLocaleString("en"));
  document.getElementById("count").textContent = `${counts[0]} of ${counts[1]} records`;
  const all = (name, change) => document.querySelectorAll(`.pages ${name}`).forEach(change);
  all(".where", (e) => { e.textContent = `page ${page + 1} of ${last + 1}`; });
  all(".previous", (e) => { e.disabled = page === 0; });
  all(".next", (e) => { e.disabled = page === last; });
}

function card(i) {
  const chips = chosenEditors().filter((e) => e.failures[i] >= 0).map((e) => {
    const scores = index.scores.filter((s) => e[s][i] !== null);
    const numbers = scores.map((s) => `${s} ${Math.round(e[s][i] * 100)}`).join(" ");
    const found = index.failures.filter((_, bit) => (e.failures[i] >> bit) & 1).join(", ");
    const failure = found === "" ? null : element("span", { class: "bad" }, " ✗ ", found);
    return element("span", {}, element("b", {}, e.label), " ", numbers, failure);
  });
  const relation = index.relation[i] < 0 ? "" : `${index.relations[index.relation[i]]} ${index.names[index.relation[i]]}`;
  const made = element(
    "details", { class: "record" },
    element(
      "summary", {}, sentence(i), " → ", element("b", { class: "new" }, index.target_new[i] ?? ""),
      index.target_true[i] === null ? null : element("span", { class: "true" }, ` (${index.target_true[i]})`),
      element("a", { class: "soft", href: `#records?words=case:${index.case_id[i]}` }, ` case ${index.case_id[i]} `),
      element("span", { class: "soft" }, relation),
      element("div", { class: "chips" }, ...chips),
    ),
  );
  made.addEventListener("toggle", () => fillCard(made, i), { once: true });
  return made;
}

function open(place) {
  const cards = document.querySelectorAll(".record");
  if (place < 0 || place >= cards.length) return;
  current = place;
  cards[place].open = true;
}

function sentence(i) {
  return (index.prompt[i] ?? "").replace("{}", () => index.subject[i] ?? "");
}

async function fillCard(made, i) {
  const place = index.details[i];
  if (place < 0) {
    made.append(element("p", { class: "soft" }, "This page has only the scores of this record."));
    return;
  }
  const number = Math.floor(place / index.chunk);
  if (!opened.has(number)) opened.set(number, unpack(`chunk-${number}`));
  const record = (await opened.get(number))[place % index.chunk];
  const chosen = new Set(chosenEditors());
  const all = index.editors.map((e, n) => ({ ...e, ...record[n], there: record[n] !== null }));
  const own = all.filter((e, n) => e.there && chosen.has(index.editors[n]));
  const before = all.find((e) => !e.edited && e.there);
  made.append(element(
    "div", {}, ...errors(own), probabilities(i, record, own, before), probes(own), ...texts(i, record, own),
    health(own),
  ));
}

function errors(own) {
  return own.filter((e) => e.error !== null)
    .map((e) => element("p", { class: "bad" }, `${e.label}: ${e.error}`));
}

/** The prompts of each kind in words, as far as they are known. */
function asked(i, record) {
  const neighbors = record.neighborhood_prompts ?? [];
  const edited = `${sentence(i)} ${index.target_new[i] ?? ""}.`;
  return {
    rewrite: [sentence(i)],
    paraphrase: record.paraphrase_prompts ?? [],
    neighborhood: neighbors,
    neighborhood_plus: neighbors.map((prompt) => `${edited} ${prompt}`),
    reversed: ["the reversed fact, with each object"],
  };
}

/** A table of both targets' probabilities: rows are prompts, columns editors. */
function probabilities(i, record, own, before) {
  const rows = [];
  for (const [kind, words] of Object.entries(asked(i, record))) {
    const count = Math.max(0, ...own.map((e) => (e[`${kind}_nll_new`] ?? e[`${kind}_greedy`] ?? e[`${kind}_wild`] ?? []).length));
    for (let p = 0; p < count; p++) {
      rows.push(element(
        "tr", {}, element("td", {}, words[p] ?? "", element("small", {}, kind.replace("_", " "))),
        ...own.map((e) => probability(e, kind, p, before)),
      ));
    }
  }
  const head = element(
    "tr", {}, element("th", { scope: "col" }, element("span", { class: "new" }, "p(new)"), " : ", element("span", { class: "true" }, "p(true)")),
    ...own.map((e) => element("th", { scope: "col" }, e.label)),
  );
  return element("div", { class: "scroll" }, element(
    "table", { class: "probabilities" }, element("thead", {}, head), element("tbody", {}, ...rows),
  ));
}

/** A table of what is said to probes: rows are questions, columns editors. */
function probes(own) {
  const put = own.map((e) => e.probes ?? []).find((some) => some.length > 0);
  if (put === undefined) return null;
  const rows = put.map((probe, p) => element(
    "tr", {},
    element("td", {}, probe.prompt, element("small", {}, `${probe.set}, ${probe.role}: ${probe.answers.join(" / ")}`)),
    ...own.map((e) => element("td", {}, ...answered((e.probes ?? [])[p]))),
  ));
  const head = element(
    "tr", {}, element("th", { scope: "col" }, "Probes"), ...own.map((e) => element("th", { scope: "col" }, e.label)),
  );
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

/** Whether the right target is the likelier one; null where that is not known. */
function right(e, kind, p) {
  const [fresh, old] = ["new", "true"].map((t) => (e[`${kind}_nll_${t}`] ?? [])[p] ?? null);
  if (fresh === null || old === null) return null;
  return kind.startsWith("neighborhood") ? old > fresh : fresh > old;
}

function probability(e, kind, p, before) {
  const [fresh, old] = ["new", "true"].map((t) => (e[`${kind}_nll_${t}`] ?? [])[p] ?? null);
  const words = spoken((e[`${kind}_greedy`] ?? [])[p], (e[`${kind}_wild`] ?? [])[p]);
  if (fresh === null && old === null) return element("td", {}, ...(words.length ? words : ["–"]));
  const good = right(e, kind, p);
  const verdict = good === null ? null
    : element("span", { class: good ? "good" : "bad" }, good ? " ✓" : " ✗");
  const was = before && e.edited ? right(before, kind, p) : null;
  const flipped = was !== null && good !== null && was !== good;
  return element(
    "td", flipped ? { class: "flipped", title: "unedited it was otherwise" } : {},
    element("span", { class: "new" }, share(fresh)), " : ", element("span", { class: "true" }, share(old)),
    verdict, flipped ? " ⇄" : null, ...words,
  );
}

function share(value) {
  if (value === null) return "–";
  return value >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(0);
}

/** Generations side by side (Figure 6): prompts and chat tokens grey, the targets in their colors. */
function texts(i, record, own) {
  const count = Math.max(0, ...own.map((e) => (e.texts ?? []).length));
  return Array.from({ length: count }, (_, t) => element(
    "div", {}, element("h3", {}, `Text ${t + 1}`),
    element("div", { class: "texts" }, ...own.filter((e) => (e.texts ?? []).length > t).map((e) =>
      element("div", {}, element("b", {}, e.label),
        element("p", {}, ...marked(e.texts[t], i, record.generation_prompts ?? []))))),
  ));
}

function marked(text, i, prompts) {
  const prompt = prompts.filter((p) => text.startsWith(p)).sort((a, b) => b.length - a.length)[0] ?? "";
  const escape = (words) => words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const [fresh, old] = [index.target_new[i], index.target_true[i]];
  const sought = [fresh, old].filter((words) => words).map(escape);
  const pattern = new RegExp(`(${[...sought, "<\\|[^|<>]*\\|>"].join("|")})`);
  const parts = text.slice(prompt.length).split(pattern).map((part) => {
    if (part === fresh) return element("mark", { class: "new" }, part);
    if (part === old) return element("mark", { class: "true" }, part);
    return part.startsWith("<|") && part.endsWith("|>") ? element("span", { class: "soft" }, part) : part;
  });
  return [prompt === "" ? null : element("span", { class: "soft" }, prompt), ...parts];
}

function health(own) {
  const lines = own.map((e) => {
    const names = Object.keys(e).filter((k) => (k.startsWith("edit_") || k === "GE" || k === "RS"));
    const known = names.filter((name) => typeof e[name] === "number");
    const numbers = known.map((n) => `${n.replace("edit_", "").replace("_", " ")} ${Number(e[n].toPrecision(3))}`);
    return numbers.length ? element("p", { class: "soft" }, `${e.label}: ${numbers.join(" · ")}`) : null;
  });
  return element("div", {}, ...lines);
}

function fill(name, words, values = words) {
  const select = form()[name];
  select.append(...words.map((word, i) => element("option", { value: values[i] }, word)));
  return select;
}

/** `/` goes to the words, `j` and `k` from record to record, Enter opens and closes one. */
function key(event) {
  const typing = event.target.matches("input[type=search], select, textarea");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const cards = [...document.querySelectorAll(".record > summary")];
  if (event.key === "/") {
    form().words.focus();
  } else if (event.key === "j" || event.key === "k") {
    current = Math.max(0, Math.min(cards.length - 1, current + (event.key === "j" ? 1 : -1)));
    cards[current]?.focus();
  } else return;
  event.preventDefault();
}

async function startRecords() {
  index = await unpack("index");
  index.sought = index.case_id.map((id, i) => [
    id, sentence(i), index.target_new[i], index.target_true[i],
    index.relations[index.relation[i]], index.names[index.relation[i]],
  ].join(" ").toLowerCase());
  const labels = index.editors.map((e) => e.label);
  document.getElementById("editors").append(...labels.map((label, i) => {
    const box = element("input", { type: "checkbox", name: `show-${i}` });
    box.checked = index.shown.includes(label);
    return element("label", { class: "check" }, box, " ", label);
  }));
  fill("editor", labels);
  fill("failure", index.failures).append(element("option", { value: "none" }, "no failure"));
  fill("relation", index.relations.map((id, i) => `${id} ${index.names[i]}`.trim()), index.relations);
  fill("sort", [
    ...index.scores.map((s) => `${s}, lowest first`),
    ...index.scores.map((s) => `${s} against unedited, largest loss first`),
    ...index.health.map((s) => (s === "GE" ? "GE, lowest first" : `${s.replace("edit_", "")}, largest first`)),
    "editors that disagree",
  ], [
    ...index.scores.map((s) => `score ${s}`),
    ...index.scores.map((s) => `change ${s}`),
    ...index.health.map((s) => (s === "GE" ? "score GE" : `high ${s}`)),
    "differ all",
  ]);
  const filters = document.getElementById("filters");
  filters.addEventListener("input", changed);
  filters.addEventListener("submit", (event) => event.preventDefault());
  for (const [name, step] of [["previous", -1], ["next", 1]]) {
    for (const button of document.getElementsByClassName(name)) button.addEventListener("click", () => turn(step));
  }
  document.addEventListener("keydown", key);
  addEventListener("hashchange", recall);
  if (!recall()) {
    filter();
    drawRecords();
  }
}
