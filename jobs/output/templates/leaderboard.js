/** Sorts the rows of the leaderboard by a column; the second click turns them round. */
function sortBy(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") !== "descending";
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => {
    const { value: known } = row.cells[column].dataset;
    if (known === undefined) return row.cells[column].textContent;
    return known === "None" ? -Infinity : Number(known);
  };
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
}

async function copy(button) {
  const text = document.getElementById(button.dataset.copy).textContent;
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = "copied";
  } catch { // Some browsers let no page from a file do that.
    const field = document.getElementById("by-hand");
    field.hidden = false;
    field.value = text;
    field.select();
    said.textContent = "copy it from here:";
  }
}

function startLeaderboard() {
  for (const button of document.querySelectorAll("#board .sort")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", () => copy(button));
  }
}
