"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const data = (id) => JSON.parse(document.getElementById(id).textContent);

  // ---- theme: the system's until the button is pressed; kept where the browser lets a file keep anything
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const KEY = "fillm-report-theme";
  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");

  function remembered() {
    try { return localStorage.getItem(KEY); } catch { return null; }
  }

  function showTheme() {
    button.setAttribute("aria-pressed", String(theme() === "dark"));
    redraw();
  }

  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem(KEY, root.dataset.theme); } catch { /* the choice holds for this visit */ }
    showTheme();
  });
  system.addEventListener("change", showTheme);

  // ---- tables
  const exact = (cell) => cell.dataset.v ?? cell.textContent;
  const words = new Intl.Collator(undefined, { numeric: true });
  const inWords = { ascending: "lowest first", descending: "highest first" };

  function sort(table, header) {
    const headers = all("th", table.tHead);
    const column = headers.indexOf(header);
    const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const numeric = header.classList.contains("number");
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const text = exact(row.cells[column]);
      const value = numeric ? Number(text.replace("inf", "Infinity")) : text;
      return { row, value, missing: text === "" };
    });
    // What is missing stays last in either order.
    keyed.sort((a, b) => a.missing - b.missing || (a.missing ? 0 :
      sign * (numeric ? (a.value > b.value) - (a.value < b.value) : words.compare(a.value, b.value))));
    table.tBodies[0].append(...keyed.map((entry) => entry.row));
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
    return `Sorted by ${header.dataset.name}, ${numeric ? inWords[order] : order}`;
  }

  function filter(table, text) {
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const held = [...row.cells].map((cell) => cell.textContent).join("\t").toLowerCase();
      row.hidden = !wanted.every((word) => held.includes(word));
      shown += !row.hidden;
    }
    return `${shown.toLocaleString("en")} of ${table.tBodies[0].rows.length.toLocaleString("en")} rows`;
  }

  function asCsv(table) {
    const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [all("th", table.tHead).map((header) => header.dataset.name)];
    for (const row of table.tBodies[0].rows) if (!row.hidden) lines.push([...row.cells].map(exact));
    return { text: lines.map((line) => line.map(quoted).join(",") + "\n").join(""), rows: lines.length - 1 };
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { /* an older way for browsers that keep the clipboard from files */ }
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "hidden-visually";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }

  for (const holder of all(".table")) {
    const table = holder.querySelector("table");
    const said = holder.querySelector("output");
    for (const header of all("th", table.tHead)) {
      header.querySelector("button").addEventListener("click", () => { said.value = sort(table, header); });
    }
    holder.querySelector("input").addEventListener("input", (event) => {
      said.value = filter(table, event.target.value);
    });
    holder.querySelector(".copy").addEventListener("click", async () => {
      const csv = asCsv(table);
      const rows = `${csv.rows.toLocaleString("en")} ${csv.rows === 1 ? "row" : "rows"}`;
      said.value = (await copy(csv.text)) ? `Copied ${rows}` : "This browser lets nothing be copied";
    });
    holder.querySelector(".columns")?.addEventListener("click", (event) => {
      const pressed = table.classList.toggle("all");
      const names = all("th", table.tHead).map((header) => header.dataset.name); // paper has them before every cell
      for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { cell.dataset.column = names[i]; });
      event.target.setAttribute("aria-pressed", String(pressed));
    });
  }

  // ---- plots
  const looks = data("looks");
  const narrow = matchMedia("(max-width: 34rem)");
  const saved = {
    displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  // What depends on the theme and the width; all else was decided when the page was written.
  function dressed(trace, look, hidden) {
    const { meta } = trace;
    if (trace.type === "heatmap") {
      trace.colorscale = meta.special
        ? [[0, look.special[meta.special]], [1, look.special[meta.special]]]
        : look.scales[meta.signed ? "signed" : "sequential"];
      if (trace.colorbar && narrow.matches) Object.assign(trace.colorbar, { thickness: 8, tickfont: { size: 10 } });
      return trace;
    }
    if (meta.style === undefined) return trace; // numbers in cells
    const colour = look.colours[meta.style % look.colours.length];
    const symbol = look.symbols[meta.style % look.symbols.length] + (meta.hollow ? "-open" : "");
    Object.assign(trace.marker, { color: colour, symbol });
    trace.line.color = colour;
    for (const bars of [trace.error_x, trace.error_y]) if (bars) bars.color = colour;
    trace.visible = hidden.has(meta.name) ? "legendonly" : true;
    return trace;
  }

  function thinned(axis, width) {
    const { ticktext, tickvals } = axis; // of a category axis
    if (!ticktext || ticktext.some((text) => text.length > 4)) return; // names are all shown, and turned where they must
    const step = Math.ceil((ticktext.length * 24) / Math.max(width, 1));
    axis.tickvals = tickvals.filter((_, i) => i % step === 0);
    axis.ticktext = ticktext.filter((_, i) => i % step === 0);
  }

  function draw(section) {
    const look = looks[theme()];
    const hidden = new Set(all(".legend [aria-pressed=false]", section).map((entry) => entry.dataset.name));
    const drawing = all(".plot", section).map((plot) => {
      const { traces, layout: wide } = data(plot.dataset.of); // parsed anew: plotly writes into what it is given
      const layout = tightened(wide);
      const beside = 7 * Math.max(...(layout.yaxis.ticktext ?? [""]).map((text) => text.length)) + (narrow.matches ? 60 : 100);
      const room = plot.clientWidth - beside;
      const cell = room / Math.max((layout.xaxis.ticktext ?? [""]).length, 1); // pixels
      for (const { mode, textfont } of traces) if (mode === "text") textfont.size = Math.max(6, Math.min(12, cell / 3.2));
      thinned(layout.xaxis, room);
      // A view that was zoomed stays as long as uirevision does.
      const whole = { ...layout, template: structuredClone(look.template), uirevision: "keep" };
      const file = { toImageButtonOptions: { filename: plot.id, scale: 2 } };
      return Plotly.react(plot, traces.map((trace) => dressed(trace, look, hidden)), whole, { ...saved, ...file });
    });
    return Promise.all(drawing);
  }

  // On a telephone the names of tensors or masks would leave no room for the cells or points.
  function tightened(layout) {
    if (!layout.meta?.short || !narrow.matches) return layout;
    Object.assign(layout.yaxis, { ticktext: layout.meta.short, tickfont: { size: 10 } });
    delete layout.yaxis.title;
    return layout;
  }

  const redraw = () => { for (const section of all(".figure.drawn")) draw(section); };
  narrow.addEventListener("change", redraw);

  for (const entry of all(".legend button")) {
    entry.addEventListener("click", () => {
      entry.setAttribute("aria-pressed", String(entry.getAttribute("aria-pressed") !== "true"));
      draw(entry.closest(".figure"));
    });
  }

  async function unpackPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    if (!window.Plotly) throw new Error("the plotting library did not start");
  }

  async function drawAll() {
    const sections = all(".figure");
    if (!sections.length) return;
    try {
      await unpackPlotly();
    } catch {
      document.getElementById("plots-failed").hidden = false; // the still pictures stay where they are
      return;
    }
    for (const section of sections) {
      section.classList.add("drawn");
      await draw(section).catch(() => section.classList.remove("drawn"));
    }
  }

  const kept = remembered();
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  showTheme();
  drawAll().finally(() => { root.dataset.ready = "yes"; });
})();
