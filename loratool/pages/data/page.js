"use strict";
// Sorting, searching and reading off; the page says everything without it.
(() => {
  const make = (tag, settings = {}, ...inside) => {
    const node = Object.assign(document.createElement(tag), settings);
    node.append(...inside);
    return node;
  };
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const FEW_ROWS = 12;

  // Tables: a button in every column's head, a search field above long ones.
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    const text = cell.textContent.trim();
    return text === "–" || text === "" ? null : text;
  };
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null); // none is always last
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
  };
  const sort = (table, column, head) => {
    const body = table.tBodies[0];
    const isNumber = [...body.rows].some((row) => row.cells[column].dataset.v !== undefined);
    const before = head.getAttribute("aria-sort");
    const sign = before ? (before === "ascending" ? -1 : 1) : isNumber ? -1 : 1;
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort((a, b) => compare(a[0], b[0], sign));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...rows.map((pair) => pair[1]));
  };
  const searchable = (table) => {
    const rows = [...table.tBodies[0].rows];
    const count = make("span", { role: "status" });
    const field = make("input", { type: "search" });
    const box = make("div", { className: "filter" }, make("label", {}, "Filter rows", field), count);
    const texts = rows.map((row) => row.textContent.toLowerCase());
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        shown += !row.hidden;
      });
      count.textContent = field.value ? `${shown} of ${rows.length} rows` : "";
    });
    table.parentElement.before(box);
  };
  for (const table of document.querySelectorAll("table.data")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const first = table.tBodies[0].rows[0]?.cells[column];
      if (first?.classList.contains("n")) head.classList.add("right");
      const button = make("button", { type: "button" }, head.textContent);
      button.addEventListener("click", () => sort(table, column, head));
      head.replaceChildren(button);
    });
    if (table.tBodies[0].rows.length > FEW_ROWS) searchable(table);
  }

  // Heat maps: what is under the pointer, or the arrow keys, is said below.
  for (const table of document.querySelectorAll("table.heat")) {
    const box = table.closest(".scroll");
    const said = make("span", { className: "read", role: "status" });
    table.closest("figure").querySelector(".legend").append(said);
    const rows = [...table.tBodies[0].rows];
    const names = [...table.tHead.rows[table.tHead.rows.length - 1].cells].map((c) => c.textContent);
    const groups = [""]; // of every column, as wide as each is
    if (table.tHead.rows.length > 1) {
      for (const head of [...table.tHead.rows[0].cells].slice(1)) {
        groups.push(...Array(head.colSpan).fill(`${head.textContent} `));
      }
    }
    let at = null;
    const tell = (row, column) => {
      at?.cell.classList.remove("at");
      const cell = rows[row].cells[column];
      at = { row, column, cell };
      cell.classList.add("at");
      const where = [rows[row].cells[0].textContent, `${groups[column] ?? ""}${names[column]}`];
      said.textContent = `${where.map((word) => word.trim()).join(" · ")}: ${cell.textContent.trim()}`;
    };
    table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("tbody td");
      if (cell) tell(rows.indexOf(cell.parentElement), cell.cellIndex);
    });
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step || event.target !== box) return;
      event.preventDefault();
      const row = at ? at.row + step[0] : 0;
      const column = at ? at.column + step[1] : 1;
      if (rows[row]?.cells[column] && column > 0) tell(row, column);
    });
  }

  // The gallery: search, filters, order.
  const form = document.querySelector(".controls");
  if (!form) return;
  const list = document.querySelector(".cards");
  const cards = [...list.children].map((node, place) => ({
    node, place, text: node.textContent.toLowerCase(), name: node.querySelector("h3").textContent,
    loads: new Set(node.dataset.loads.split("|")),
  }));
  const count = document.querySelector(".count");
  const { text, family, program, order, same } = form.elements;
  let ordered = "";
  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const card of cards) {
      const fits = words.every((word) => card.text.includes(word))
        && (!family.value || card.node.dataset.family === family.value)
        && (!program.value || card.loads.has(program.value))
        && (!same.checked || "same" in card.node.dataset);
      card.node.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown === cards.length ? `${shown} files` : `${shown} of ${cards.length} files`;
    if (order.value === ordered) return;
    ordered = order.value;
    const key = ordered.replace("-", "");
    const sign = ordered.startsWith("-") ? -1 : 1;
    cards.sort((a, b) => key === "" ? a.place - b.place
      : key === "name" ? collator.compare(a.name, b.name)
      : sign * (Number(a.node.dataset[key]) - Number(b.node.dataset[key])) || a.place - b.place);
    list.append(...cards.map((card) => card.node));
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
