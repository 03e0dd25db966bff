const get = (id) => document.getElementById(id);
let study, items;
/** All raters of this device, each {name, place, answers}, and who of them is rating. */
let kept;

function remember() {
  // Some browsers keep nothing for pages opened from a file.
  try { localStorage.setItem(study, JSON.stringify(kept)); } catch { /* Then it is for one visit. */ }
}

function remembered() {
  try { return JSON.parse(localStorage.getItem(study)); } catch { return null; }
}

function rating() {
  return kept.raters.find(({ name }) => name === kept.rater);
}

function show() {
  const state = rating();
  get("welcome").hidden = state !== undefined;
  get("rating").hidden = state === undefined || state.place >= items.length;
  get("end").hidden = state === undefined || state.place < items.length;
  if (get("rating").hidden) return;
  const { fact, texts } = items[state.place];
  get("progress").textContent = `${state.place + 1} of ${items.length}`;
  get("name").textContent = state.name;
  get("fact").textContent = fact;
  texts.forEach((text, i) => { get(`text-${i + 1}`).textContent = text; });
  get("rating").reset();
  for (const [question, value] of Object.entries(state.answers[state.place] ?? {})) {
    get("rating").elements[question].value = value;
  }
  get("back").disabled = state.place === 0;
  scrollTo(0, 0);
}

function move(step) {
  rating().place += step;
  remember();
  show();
}

/** The rater of a name begins, or goes on; none: the page asks for one. */
function turn(name) {
  if (name && !kept.raters.some((one) => one.name === name)) {
    kept.raters.push({ name, place: 0, answers: [] });
  }
  kept.rater = name || null;
  get("welcome").reset();
  remember();
  show();
}

function save() {
  const { name, answers } = rating();
  const data = { study, rater: name, answers };
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  element("a", { href: url, download: `answers-${name.replace(/[^\p{L}\p{N}]+/gu, "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Answers the first question that has none by a key, and remembers each answer as it is given. */
function answered() {
  const state = rating();
  state.answers[state.place] = Object.fromEntries(new FormData(get("rating")));
  remember();
}

function byKey(event) {
  const side = { 1: "1", 2: "2", 3: "same" }[event.key];
  if (get("rating").hidden || side === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = [...new Set([...get("rating").querySelectorAll("input")].map((input) => input.name))];
  const open = names.find((name) => get("rating").elements[name].value === "");
  if (open === undefined) return;
  get("rating").elements[open].value = side;
  answered();
  if (open === names[names.length - 1]) get("next").focus();
}

async function start() {
  ({ study, items } = await unpack("items"));
  kept = remembered() ?? { rater: null, raters: [] };
  get("welcome").addEventListener("submit", (event) => {
    event.preventDefault();
    turn(get("welcome").elements.rater.value.trim());
  });
  get("rating").addEventListener("submit", (event) => {
    event.preventDefault();
    answered();
    move(1);
  });
  get("back").addEventListener("click", () => move(-1));
  get("again").addEventListener("click", () => move(-items.length));
  get("save").addEventListener("click", save);
  for (const button of document.querySelectorAll("button.other")) {
    button.addEventListener("click", () => turn(null));
  }
  get("rating").addEventListener("change", answered);
  document.addEventListener("keydown", byKey);
  show();
}

start();
