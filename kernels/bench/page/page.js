"use strict";
(() => {
  const body = document.querySelector("table.sortable tbody");
  if (!body) return;
  const rows = [...body.rows];
  const input = document.getElementById("filter");
  const count = document.getElementById("count");
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) shown += 1;
    }
    count.textContent = `${shown} of ${rows.length} lines.`;
  };
  input.addEventListener("input", show);
  show();
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  document.querySelectorAll("table.sortable th").forEach((head, column) => {
    let down = false;
    head.addEventListener("click", () => {
      down = !down;
      const numbers = body.rows[0].cells[column].classList.contains("number");
      const compare = (a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (!numbers) return x.localeCompare(y);
        if (x === "" || y === "") return (x === "") - (y === "");
        return Number(x) - Number(y);
      };
      rows.sort((a, b) => (down ? compare(a, b) : compare(b, a)));
      body.append(...rows);
    });
  });
})();
