"use strict";
// Sorting and filtering of tables. The page is whole without it. The state stands in the address:
// #anchor&s.TABLE=COLUMN+d&q.TABLE=TEXT, so that a link shows what its sender saw.
(() => {
  const tables = [...document.querySelectorAll("table[data-sort]")];
  const state = new Map();
  let anchor = "";

  const read = () => {
    state.clear();
    const parts = location.hash.slice(1).split("&");
    anchor = parts[0].includes("=") ? "" : parts.shift();
    for (const part of parts) {
      const at = part.indexOf("=");
      if (at < 0) continue;
      try { state.set(part.slice(0, at), decodeURIComponent(part.slice(at + 1))); } catch { /* not ours */ }
    }
  };
  const write = () => {
    const parts = anchor ? [anchor] : [];
    for (const [key, value] of state) if (value) parts.push(key + "=" + encodeURIComponent(value));
    history.replaceState(null, "", "#" + parts.join("&"));
  };

  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return null;
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    const text = cell.textContent.trim();
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
  };
  // Numbers before words: in a column of figures the words are statuses, and stay at the end.
  const compare = (a, b, sign) => {
    const words = (typeof a === "string") - (typeof b === "string");
    if (words) return words;
    return typeof a === "string" ? sign * a.localeCompare(b) : sign * (a - b);
  };

  const original = new Map();
  const apply = (table) => {
    const chosen = /^(\d+)([ad])$/.exec(state.get("s." + table.id) || "");
    const words = (state.get("q." + table.id) || "").toLowerCase().split(/\s+/).filter(Boolean);
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      if (chosen && Number(chosen[1]) === index) {
        head.setAttribute("aria-sort", chosen[2] === "d" ? "descending" : "ascending");
      } else {
        head.removeAttribute("aria-sort");
      }
    });
    if (chosen || words.length) table.closest("details")?.setAttribute("open", "");
    let shown = 0, all = 0;
    for (const body of table.tBodies) {
      if (!original.has(body)) original.set(body, [...body.rows]);
      const rows = original.get(body);
      const fixed = (row) => row.classList.contains("group") || row.classList.contains("mean");
      const sortable = rows.filter((row) => !fixed(row));
      if (chosen) {
        const column = Number(chosen[1]), sign = chosen[2] === "d" ? -1 : 1;
        sortable.sort((a, b) => compare(key(a, column), key(b, column), sign));
      }
      body.append(...rows.filter((row) => row.classList.contains("group")), ...sortable,
        ...rows.filter((row) => row.classList.contains("mean")));
      for (const row of sortable) {
        const text = row.textContent.toLowerCase();
        const hit = words.every((word) => text.includes(word));
        row.hidden = !hit;
        all += 1;
        if (hit) shown += 1;
      }
    }
    const tools = document.getElementById(table.id + "-tools");
    if (tools) {
      const input = tools.querySelector("input");
      const text = state.get("q." + table.id) || "";
      if (input.value !== text) input.value = text;
      tools.querySelector("output").textContent = shown + " of " + all + " rows";
    }
  };

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = state.get("s." + table.id);
        const next = now === index + "a" ? index + "d" : now === index + "d" ? "" : index + "a";
        state.set("s." + table.id, next);
        apply(table);
        write();
      });
    });
    if (table.dataset.filter !== undefined) {
      const tools = document.createElement("div");
      tools.className = "tools";
      tools.id = table.id + "-tools";
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.type = "search";
      label.append("Filter rows ", input);
      const output = document.createElement("output");
      tools.append(label, output);
      table.parentElement.before(tools);
      input.addEventListener("input", () => {
        state.set("q." + table.id, input.value);
        apply(table);
        write();
      });
    }
  }

  // A region that does not scroll lets its table's head stick to the window instead.
  const fit = () => {
    for (const region of document.querySelectorAll(".scroll")) {
      region.classList.remove("fits");
      region.classList.toggle("fits", region.scrollWidth <= region.clientWidth);
    }
  };
  const show = () => {
    read();
    tables.forEach(apply);
    const target = anchor && location.hash.includes("&") && document.getElementById(anchor);
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", show);
  addEventListener("resize", fit);
  show();
  fit();
})();
