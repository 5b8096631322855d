"use strict";
// Without this script the page is whole: every prompt is listed in full and nothing can be filtered.
(() => {
  const table = document.getElementById("samples");
  if (table) filterable(table, document.getElementById("filter"), document.getElementById("more"));

  // A paper copy without its settings cannot be checked.
  const closed = () => [...document.querySelectorAll("#settings details:not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = closed(); opened.forEach(d => { d.open = true; }); });
  addEventListener("afterprint", () => { opened.forEach(d => { d.open = false; }); opened = []; });

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
    if (form.kind) form.set.addEventListener("change", offerKinds);
    form.addEventListener("input", restart);
    more.addEventListener("click", event => {
      if (event.target.name) { limit = event.target.name === "all" ? rows.length : limit + PAGE; show(); }
    });
    table.classList.add("short");
    form.hidden = false;
    read();
    if (form.kind) offerKinds();
    show();
  }
})();
