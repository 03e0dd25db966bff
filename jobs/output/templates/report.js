startLeaderboard();
startRecords();
startCharts().then(() => {
  // Charts move what is below them.
  const [place] = location.hash.slice(1).split("?");
  document.getElementById(place)?.scrollIntoView();
});
addEventListener("beforeprint", () => { document.getElementById("all").open = true; });
