/** The colors of the page for charts, light or dark. */
function colors() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, accent] = ["--ink", "--soft", "--line", "--accent"]
    .map((name) => style.getPropertyValue(name).trim());
  const text = { labelColor: ink, titleColor: ink, labelLimit: 260 };
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    axis: { ...text, domainColor: soft, tickColor: soft, gridColor: line },
    header: text, legend: { ...text, symbolLimit: 40 }, title: { color: ink },
    view: { stroke: line },
    rule: { color: accent }, bar: { color: accent, opacity: 0.6 }, point: { color: accent },
    range: { category: { scheme: "tableau20" } },
  };
}

async function draw(place) {
  const spec = await unpack(place.dataset.spec);
  // With its own interpreter, Vega needs no right to make code out of text.
  const { view } = await vegaEmbed(place, spec, {
    ast: true, renderer: "svg", config: colors(), actions: false, tooltip: { theme: "custom" },
  });
  view.addEventListener("click", (_, item) => {
    if (item && item.datum && item.datum.href) location.hash = item.datum.href;
  });
}

async function startCharts() {
  const places = [...document.querySelectorAll(".drawing")];
  const all = () => Promise.all(places.map(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  await all();
  document.body.dataset.drawn = "yes";
}
