"use strict";
// Without this script the page is whole: every prompt is listed in full beside the answers of two variants, rows are in
// the order of the run, and nothing can be filtered.
(() => {
  const table = document.getElementById("samples");
  const order = document.getElementById("order");
  const data = document.getElementById("answers");
  if (order) sortable(document.getElementById("tried").tBodies[0], order);
  if (table) filterable(table, document.getElementById("filter"), document.getElementById("more"));
  if (data) replaceable(table, JSON.parse(data.textContent).variants, JSON.parse(data.textContent).answers);

  // A paper copy without its settings cannot be checked.
  const closed = () => [...document.querySelectorAll("#settings details:not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = closed(); opened.forEach(d => { d.open = true; }); });
  addEventListener("afterprint", () => { opened.forEach(d => { d.open = false; }); opened = []; });

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

  function replaceable(table, variants, answers) {
    const selects = ["first", "second"].map(id => document.getElementById(id));
    const rows = [...table.tBodies[0].rows];
    const names = [...table.tHead.rows[0].cells].slice(1);
    const word = outcome => outcome == null ? "unscored" : outcome === "complied" ? "answered" : outcome;

    function change(before, after) {
      if (before == null || after == null) return "unscored";
      if (before === after) return "unchanged";
      if (after === "broken") return "broke";
      return after === "refused" ? "started refusing" : before === "refused" ? "stopped refusing" : "mended";
    }

    function judgement(change, harmful) {
      if (change === "broke") return "worse";
      if (!harmful || !change.endsWith("refusing")) return "";
      return (change === "started refusing") === (harmful === "true") ? "better" : "worse";
    }

    function replace() {
      const chosen = selects.map(select => Number(select.value));
      names.forEach((cell, i) => { cell.textContent = variants[chosen[i]]; });
      rows.forEach((row, r) => {
        const pair = chosen.map(index => answers[r][index] ?? ["", null, ""]);
        pair.forEach(([text, outcome, reading], i) => {
          const cell = row.cells[1 + i];
          cell.dataset.label = variants[chosen[i]];
          cell.querySelector(".verdict").textContent = word(outcome);
          cell.querySelector(".text").textContent = text;
          cell.querySelector(".reading").textContent = reading;
        });
        const label = row.querySelector(".change");
        row.dataset.change = label.textContent = change(pair[0][1], pair[1][1]);
        label.className = `change ${judgement(row.dataset.change, row.dataset.harmful)}`;
      });
      table.dispatchEvent(new Event("replaced"));
    }

    for (const select of selects) select.addEventListener("change", replace);
    // A browser that comes back to the page may have kept another choice.
    if (selects.some((select, i) => variants[select.value] !== names[i].textContent)) replace();
  }

  function filterable(table, form, more) {
    const PAGE = 40;
    const LONG = 320;
    const rows = [...table.tBodies[0].rows].map(row => ({ row }));
    let limit = PAGE;

    // Every field of the form but the text is the name of a data attribute of the rows.
    function show() {
      const { text, ...exact } = Object.fromEntries(new FormData(form));
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = item => Object.entries(exact).every(([name, value]) => !value || item.row.dataset[name] === value)
        && words.every(word => item.text.includes(word));
      let found = 0;
      for (const item of rows) item.row.hidden = !wanted(item) || ++found > limit;
      form.querySelector("output").textContent =
        `${Math.min(found, limit)} of ${found === rows.length ? found : `${found} found, ${rows.length} in all`}`;
      more.hidden = found <= limit;
    }

    function restart() { limit = PAGE; show(); }

    // Kinds of another set can match nothing.
    function offerKinds() {
      const kinds = new Set(rows.filter(({ row }) => !form.set.value || row.dataset.set === form.set.value)
        .map(({ row }) => row.dataset.kind));
      for (const option of form.kind.options) option.hidden = option.disabled = option.value && !kinds.has(option.value);
      if (form.kind.selectedOptions[0].disabled) form.kind.value = "";
    }

    // Again whenever the answers of a row are replaced.
    function read() {
      for (const item of rows) {
        const { row } = item;
        row.classList.remove("open");
        row.querySelector(".unfold")?.remove();
        item.text = row.textContent.toLowerCase();
        if (![...row.querySelectorAll(".text")].some(p => p.textContent.length > LONG)) continue;
        const button = document.createElement("button");
        button.type = "button";
        button.className = "unfold";
        button.textContent = "Full answers";
        button.setAttribute("aria-expanded", "false");
        row.cells[0].append(button);
      }
    }

    table.addEventListener("replaced", () => { read(); show(); });
    table.addEventListener("click", event => {
      if (!event.target.matches(".unfold")) return;
      const open = event.target.closest("tr").classList.toggle("open");
      event.target.setAttribute("aria-expanded", open);
      event.target.textContent = open ? "Shorter" : "Full answers";
    });
    form.addEventListener("submit", event => event.preventDefault());
    if (form.kind && form.set) form.set.addEventListener("change", offerKinds);
    form.addEventListener("input", restart);
    more.addEventListener("click", event => {
      if (event.target.name) { limit = event.target.name === "all" ? rows.length : limit + PAGE; show(); }
    });
    table.classList.add("short");
    form.hidden = false;
    read();
    if (form.kind && form.set) offerKinds();
    show();
  }
})();
