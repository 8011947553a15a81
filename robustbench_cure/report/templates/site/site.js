"use strict";
// Sorting is DataTables' (MIT); here are the switches above the leaderboards. Without a script all rows are shown.
(() => {
  const form = document.getElementById("controls"), find = document.getElementById("find");
  const which = document.getElementById("which"), status = document.getElementById("shown");
  const filters = [...form.querySelectorAll("select[data-filter]")];
  const boxes = [...form.querySelectorAll("input[name=kind]")];
  const leaderboards = [...document.querySelectorAll(".leaderboard-box")].map((section) => {
    const element = section.querySelector("table.leaderboard");
    const words = { emptyTable: "No rows.", zeroRecords: "No row matches." };
    const layout = { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null };
    const table = new DataTable(element, { paging: false, info: false, autoWidth: false, order: [], layout, language: words });
    return { section, table };
  });
  const refresh = () => {
    const kinds = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0, all = 0;
    for (const { section, table } of leaderboards) {
      section.hidden = which.value !== "" && which.value !== section.dataset.leaderboard;
      table.search.fixed("rows", (text, data, index) => {
        const row = table.row(index).node().dataset;
        return kinds.has(row.kind) && filters.every((f) => f.value === "" || f.value === row[f.dataset.filter]);
      });
      table.search(find.value).draw();
      all += table.rows().count();
      if (!section.hidden) shown += table.rows({ search: "applied" }).count();
    }
    status.textContent = `${shown} of ${all} rows shown`;
  };
  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  refresh();
})();
