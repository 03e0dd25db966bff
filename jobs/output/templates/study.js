const get = (id) => document.getElementById(id);
let study, items, state;

function remember() {
  // Some browsers keep nothing for pages opened from a file.
  try { localStorage.setItem(study, JSON.stringify(state)); } catch { /* Then it is for one visit. */ }
}

function remembered() {
  try { return JSON.parse(localStorage.getItem(study)); } catch { return null; }
}

function show() {
  get("welcome").hidden = state.rater !== null;
  get("rating").hidden = state.rater === null || state.place >= items.length;
  get("end").hidden = state.rater === null || state.place < items.length;
  if (get("rating").hidden) return;
  const { fact, texts } = items[state.place];
  get("progress").textContent = `${state.place + 1} of ${items.length}`;
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
  state.place += step;
  remember();
  show();
}

function save() {
  const data = { study, rater: state.rater, answers: state.answers };
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  const name = state.rater.replace(/[^\p{L}\p{N}]+/gu, "-");
  element("a", { href: url, download: `answers-${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Answers the first question that has none by a key, and remembers each answer as it is given. */
function answered() {
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
  state = remembered() ?? { rater: null, place: 0, answers: [] };
  get("welcome").addEventListener("submit", (event) => {
    event.preventDefault();
    state.rater = get("welcome").elements.rater.value.trim() || null;
    move(0);
  });
  get("rating").addEventListener("submit", (event) => {
    event.preventDefault();
    state.answers[state.place] = Object.fromEntries(new FormData(get("rating")));
    move(1);
  });
  get("back").addEventListener("click", () => move(-1));
  get("again").addEventListener("click", () => move(-items.length));
  get("save").addEventListener("click", save);
  get("other").addEventListener("click", () => {
    state = { rater: null, place: 0, answers: [] };
    get("welcome").reset();
    move(0);
  });
  get("rating").addEventListener("change", answered);
  document.addEventListener("keydown", byKey);
  show();
}

start();
