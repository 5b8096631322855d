// Without this script points stand in the order of the run, and one point's answers beside the dense model's.
(() => {
  const order = document.getElementById("order");
  const point = document.getElementById("point");
  if (order) sortable(document.getElementById("tried").tBodies[0], order);
  if (point) replaceable(document.getElementById("samples"), point);

  function sortable(body, select) {
    const rows = [...body.rows];
    select.addEventListener("change", () => {
      const { column, sign } = select.selectedOptions[0].dataset;
      const value = row => parseFloat(row.cells[column].dataset.value);
      const measured = column ? rows.filter(row => !isNaN(value(row))) : rows;
      if (column) measured.sort((a, b) => sign * (value(a) - value(b)));
      body.append(...measured, ...rows.filter(row => !measured.includes(row)));
    });
    select.form.addEventListener("submit", event => event.preventDefault());
    select.form.hidden = false;
  }

  function replaceable(table, select) {
    const { points, answers } = JSON.parse(document.getElementById("answers").textContent);
    const rows = [...table.tBodies[0].rows];
    const name = table.tHead.rows[0].cells[2];
    const word = refused => refused == null ? "unscored" : refused ? "refused" : "answered";

    function change(before, after) {
      if (before == null || after == null) return "unscored";
      return before === after ? "unchanged" : before ? "stopped refusing" : "started refusing";
    }

    function replace() {
      const index = points.indexOf(select.value);
      name.textContent = select.value;
      rows.forEach((row, i) => {
        const [dense, other] = [answers[i][0] ?? ["", null], answers[i][index] ?? ["", null]];
        const cell = row.cells[2];
        cell.dataset.label = select.value;
        cell.querySelector(".verdict").textContent = word(other[1]);
        cell.querySelector(".text").textContent = other[0];
        row.dataset.change = row.querySelector(".change").textContent = change(dense[1], other[1]);
        row.querySelector(".change").classList.toggle("same", !row.dataset.change.endsWith("refusing"));
      });
      table.dispatchEvent(new Event("replaced"));
    }

    select.addEventListener("change", replace);
    // A browser that comes back to the page may have kept another choice.
    if (select.value !== name.textContent) replace();
  }
})();
