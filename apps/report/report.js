"use strict";
// Draws the document that the command wrote beside --json: the same numbers, under the same keys.
(() => {
  const doc = JSON.parse(document.getElementById("fireq-data").textContent);
  const profiles = JSON.parse(document.getElementById("fireq-profiles").textContent);
  const errors = [];
  window.addEventListener("error", (event) => { errors.push(event.message); document.body.dataset.errors = errors.length; });

  // ---- small things -------------------------------------------------------------------------------------------
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "onclick" || key === "oninput" || key === "onchange") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const number = (x, digits = 4) => {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (typeof x !== "number") return String(x);
    const rounded = Number.isInteger(x) ? x : Number(x.toPrecision(digits));
    return Math.abs(rounded) >= 1000 && Math.abs(rounded) < 1e15 ? rounded.toLocaleString("en") : rounded.toString();
  };
  const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(2) + "\u00a0%");
  const bytes = (x) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let i = 0;
    while (x >= 1000 && i < units.length - 1) { x /= 1000; ++i; }
    return `${x.toFixed(i === 0 ? 0 : 1)} ${units[i]}`;
  };
  const counted = (n, thing) => `${number(n)} ${thing}${n === 1 ? "" : "s"}`;
  const unique = (values) => [...new Set(values)];
  const shortName = (name) => name.replace(/^model\.layers\.\d+\./, "");
  const layerOf = (name) => Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? NaN);
  const main = document.getElementById("main");
  const section = (id, title, note) => {
    const node = make("section", { id }, make("h2", {}, title));
    if (note) node.append(make("p", { class: "note" }, note));
    main.append(node);
    document.getElementById("contents").append(make("a", { href: "#" + id }, title));
    return node;
  };
  const select = (label, options, onchange) => {
    const box = make("select", { onchange: () => onchange(box.value) });
    for (const [value, text] of options) box.append(make("option", { value }, text));
    return { box, label: make("label", {}, label, box) };
  };

  // ---- plots --------------------------------------------------------------------------------------------------
  const drawn = new Map(); // node -> function that draws it again
  const narrow = window.matchMedia("(max-width: 640px)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const layout = (extra) => {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    const merged = { margin: { l: 56, r: 16, t: narrow.matches ? 8 : 32, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: 12 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, ...extra };
    for (const name of ["xaxis", "yaxis"]) merged[name] = { ...axis, ...(extra[name] ?? {}) };
    return merged;
  };
  const plot = (node, build) => {
    const draw = () => { const { traces, extra } = build(); return Plotly.react(node, traces, layout(extra), { responsive: true, displaylogo: false, displayModeBar: !narrow.matches }); };
    drawn.set(node, draw);
    draw();
    return node;
  };
  const plotNode = (label) => make("div", { class: "plot", role: "img", "aria-label": label });
  // A plot's title is the page's own heading: it wraps on a phone, where plotly would cut it off.
  const titled = (title, node) => [make("h3", {}, title), node];

  // Rows with a layer and a name, drawn as layer × name; colours by log10, the figure itself on hover.
  const heatMap = (parent, rows, nameOf, metrics, onPick) => {
    const names = unique(rows.map(nameOf));
    const layers = unique(rows.map((r) => r.layer)).sort((a, b) => a - b);
    const present = metrics.filter(([key]) => rows.some((r) => r[key] > 0));
    if (!present.length) return;
    let metric = present[0][0];
    const picker = select("Colour: ", present, (value) => { metric = value; drawn.get(node)(); });
    const node = plotNode("heat map, layer by site");
    parent.append(make("div", { class: "controls" }, picker.label), node);
    const at = new Map(rows.map((r) => [r.layer + "|" + nameOf(r), r]));
    plot(node, () => {
      const values = layers.map((l) => names.map((n) => at.get(l + "|" + n)?.[metric] ?? null));
      const log = values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null)));
      const flat = log.flat().filter((v) => v !== null);
      const [low, high] = [Math.min(...flat), Math.max(...flat)];
      const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => low + t * (high - low));
      return {
        traces: [{ type: "heatmap", x: names, y: layers, z: log, customdata: values, colorscale: "Viridis", xgap: 1, ygap: 1,
          colorbar: { tickvals: ticks, ticktext: ticks.map((t) => number(10 ** t, 3)), thickness: 14 },
          hovertemplate: "layer %{y}, %{x}<br>" + metric + " %{customdata:.5g}<extra></extra>" }],
        extra: { height: Math.max(320, 90 + 16 * layers.length), yaxis: { title: { text: "layer" }, autorange: "reversed", dtick: layers.length > 40 ? 5 : 1 }, xaxis: { tickangle: -35 } },
      };
    });
    if (onPick) node.on("plotly_click", (event) => onPick(event.points[0].y, event.points[0].x));
  };

  // Columns: [key, label, show]. Click a head to sort, type to filter.
  const table = (parent, id, columns, rows, order) => {
    let [key, down] = order;
    const filter = make("input", { type: "search", placeholder: "filter, e.g. layers.3 or down", "aria-label": "filter rows", oninput: () => fill() });
    const head = make("tr");
    const body = make("tbody");
    const text = (c) => typeof rows[0]?.[c[0]] === "string";
    for (const c of columns) {
      head.append(make("th", { class: text(c) ? "text" : "", scope: "col", onclick: () => { down = key === c[0] ? !down : !text(c); key = c[0]; fill(); } }, c[1]));
    }
    const fill = () => {
      const wanted = filter.value.trim().toLowerCase();
      const chosen = rows.filter((r) => !wanted || columns.some((c) => String(r[c[0]]).toLowerCase().includes(wanted)));
      chosen.sort((a, b) => {
        const [x, y] = [a[key], b[key]];
        const way = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : (x ?? -Infinity) - (y ?? -Infinity);
        return down ? -way : way;
      });
      [...head.children].forEach((th, i) => th.setAttribute("aria-sort", columns[i][0] !== key ? "none" : down ? "descending" : "ascending"));
      body.replaceChildren(...chosen.map((r) => make("tr", {}, ...columns.map((c) =>
        make("td", { class: text(c) ? "text" : "", "data-value": r[c[0]] ?? "" }, (c[2] ?? number)(r[c[0]]))))));
    };
    fill();
    parent.append(make("div", { class: "controls" }, filter),
      make("div", { class: "scroll" }, make("table", { id }, make("thead", {}, head), body)));
  };

  // ---- sections -----------------------------------------------------------------------------------------------
  const facts = () => {
    const part = section("overview", "Overview");
    const list = make("div", { class: "facts" });
    const fact = (label, value) => { if (value !== undefined && value !== null && value !== "") list.append(make("div", {}, make("span", {}, label), String(value))); };
    fact("Kind", { fireq: "FireQ checkpoint", model: "original checkpoint", statistics: "calibration statistics" }[doc.kind]);
    if (doc.imported) fact("Quantised before", `by ${doc.imported.method}, 4 bits, ${doc.imported.group_size ? "groups of " + doc.imported.group_size : "one group a row"}`);
    fact("Made by", doc.tool_version && "fireq " + doc.tool_version);
    fact("Tensors", doc.bytes && bytes(doc.bytes));
    if (doc.reference_bytes) fact("Of the original", `${bytes(doc.reference_bytes)} (now ${percent(doc.bytes / doc.reference_bytes)})`);
    fact("Levels", doc.levels && doc.levels.map((x) => number(x)).join(", "));
    fact("Second-level scales", doc.row_scale && { row: "one per row", tensor: "one per tensor" }[doc.row_scale]);
    fact("Layout", doc.layout);
    fact("Calibration", doc.tokens && `${counted(doc.tokens, "token")} in ${counted(doc.windows, "window")}`);
    fact("Preset", doc.recipe?.preset);
    fact("Source fingerprint", doc.source_fingerprint);
    fact("Calibration fingerprint", doc.calibration_fingerprint);
    part.append(list);
    if (doc.recipe) part.append(make("details", {}, make("summary", {}, "The whole recipe"), make("pre", {}, JSON.stringify(doc.recipe, null, 2))));
  };

  const METRICS = [["max_over_rms", "max / rms"], ["kurtosis", "kurtosis"], ["absmax", "largest magnitude"], ["rms", "rms"]];
  let showProfile = () => {};

  const sites = () => {
    if (!doc.sites) return;
    const part = section("outliers", "Activations: where the outliers are",
      "Each cell is a site of a layer on the calibration text. A large max / rms or kurtosis means a few channels stand far out, which FP8 and INT4 pay for. Click a cell to see its channels.");
    const draw = () => heatMap(part, doc.sites, (r) => r.site, METRICS, (layer, site) => { showProfile(layer, site); document.getElementById("channels")?.scrollIntoView(); });
    draw();
    const rows = doc.sites.map((r) => ({ ...r, top: r.outliers.map((o) => `${o.channel} (${number(o.ratio, 3)}×)`).join(" ") }));
    table(part, "sites-table", [["layer", "layer"], ["site", "site"], ["absmax", "absmax"], ["rms", "rms"], ["max_over_rms", "max/rms"],
      ["kurtosis", "kurtosis"], ["top", "top channels (× median)"]], rows, ["max_over_rms", true]);
  };

  const channels = () => {
    if (!profiles.sites?.length) return;
    const part = section("channels", "Channels",
      "Largest magnitude (and rms) of each channel. For keys: before RoPE, after it, with the recipe's N, and with N and S; rings mark the channels that S acts on. Drag to zoom, double click to return.");
    const KEYS = ["k_pre_rope", "k_post_rope", "k_after_n", "k_after_n_s"];
    const layers = unique(profiles.sites.map((p) => p.layer));
    const names = unique(profiles.sites.map((p) => p.site));
    const groups = [...(names.some((n) => KEYS.includes(n)) ? [["keys", "keys: all stages"]] : []), ...names.map((n) => [n, n])];
    let [layer, site] = [layers[0], groups[0][0]];
    const redraw = () => drawn.get(node)();
    const layerBox = select("Layer: ", layers.map((l) => [l, l]), (v) => { layer = Number(v); redraw(); });
    const siteBox = select("Site: ", groups, (v) => { site = v; redraw(); });
    const node = plotNode("magnitude by channel");
    part.append(make("div", { class: "controls" }, layerBox.label, siteBox.label), node);
    plot(node, () => {
      const wanted = site === "keys" ? KEYS : [site];
      const chosen = profiles.sites.filter((p) => p.layer === layer && wanted.includes(p.site));
      const traces = [];
      for (const p of chosen) {
        const x = p.absmax.map((_, i) => i * p.step);
        traces.push({ type: "scatter", mode: "lines", name: p.site, x, y: p.absmax, line: { width: 1 },
          hovertemplate: (p.step > 1 ? `largest of ${p.step} channels from %{x}` : "channel %{x}") + "<br>absmax %{y:.4g}<extra>" + p.site + "</extra>" });
        if (site !== "keys") {
          traces.push({ type: "scatter", mode: "lines", name: p.site + ", rms", x, y: p.rms, line: { width: 1 }, hovertemplate: "rms %{y:.4g}<extra></extra>" });
        }
      }
      const last = chosen.find((p) => p.site === "k_after_n_s");
      const s = profiles.s_channels?.find((e) => e.layer === layer)?.channels ?? [];
      if (last && s.length) {
        traces.push({ type: "scatter", mode: "markers", name: "S acts here", x: s, y: s.map((c) => last.absmax[Math.floor(c / last.step)]),
          marker: { symbol: "circle-open", size: 9, color: colour("--accent") }, hovertemplate: "channel %{x}, divided by S<extra></extra>" });
      }
      return { traces, extra: { height: 420, xaxis: { title: { text: "channel" } }, yaxis: { title: { text: "magnitude" }, rangemode: "tozero" } } };
    });
    showProfile = (l, name) => {
      [layer, site] = [l, KEYS.includes(name) ? "keys" : name];
      [layerBox.box.value, siteBox.box.value] = [layer, site];
      redraw();
    };
  };

  const weights = () => {
    if (!doc.weights) return;
    const part = section("weights", "Weights by input channel", "Columns of each linear: how far the largest weight stands over the rms.");
    heatMap(part, doc.weights, (r) => shortName(r.site), METRICS);
    const rows = doc.weights.map((r) => ({ ...r, top: r.outliers.map((o) => `${o.channel} (${number(o.ratio, 3)}×)`).join(" ") }));
    table(part, "weights-table", [["layer", "layer"], ["site", "linear"], ["absmax", "absmax"], ["rms", "rms"], ["max_over_rms", "max/rms"],
      ["kurtosis", "kurtosis"], ["top", "top columns (× median)"]], rows, ["max_over_rms", true]);
  };

  const costs = () => {
    const a = doc.attribution;
    if (!a) return;
    const part = section("fix-first", "What to fix first",
      `Cost of each part on ${number(a.scored)} tokens of text, as KL from the original (nats per token). Alone: only this part is on. The gain is what leaving the part out takes off the whole.`);
    const rows = a.parts.map((p) => ({ part: p.part, kl: p.kl, delta_nll: p.delta_nll, gain: p.without ? a.all.kl - p.without.kl : null, gain_nll: p.without ? a.all.delta_nll - p.without.delta_nll : null }));
    rows.push({ part: "everything", kl: a.all.kl, delta_nll: a.all.delta_nll, gain: null, gain_nll: null });
    table(part, "parts-table", [["part", "part"], ["kl", "KL alone"], ["delta_nll", "Δnll alone"], ["gain", "KL gained without it"], ["gain_nll", "Δnll gained without it"]], rows, ["kl", true]);
    const bars = (label, title, items) => {
      const sorted = [...items].sort((x, y) => x[1] - y[1]);
      const node = plotNode(label);
      part.append(...titled(title, node));
      plot(node, () => ({ traces: [{ type: "bar", orientation: "h", y: sorted.map((i) => i[0]), x: sorted.map((i) => i[1]), customdata: sorted.map((i) => i[2]),
        hovertemplate: "%{y}: KL %{x:.5f}, Δnll %{customdata:.5f}<extra></extra>" }],
        extra: { height: 90 + 18 * sorted.length, xaxis: { title: { text: "KL" } }, yaxis: { type: "category" } } }));
    };
    bars("cost of each linear's weights", "Packed weights of one linear in all layers", a.linears.map((p) => [p.part, p.kl, p.delta_nll]));
    bars("cost of each layer's weights", "Packed weights of one layer", a.layers.map((l) => ["layer " + l.layer, l.kl, l.delta_nll]));
  };

  const linears = () => {
    if (!doc.linears?.length) return;
    const part = section("errors", "Weight error, worst first",
      "Frobenius norm of packed minus folded original, over the original's: what rounding to 4 bits does to each linear.");
    const rows = doc.linears.map((r) => ({ ...r, layer: layerOf(r.name), worst: r.worst_group ? r.worst_group.rel_error : null }));
    heatMap(part, rows, (r) => shortName(r.name), [["rel_error", "relative error"], ["worst", "worst group"], ["product_rel_error", "product, FP32 against FP64"]]);
    table(part, "linears-table", [["name", "linear"], ["rows", "rows"], ["cols", "columns"], ["rel_error", "error"], ["snr_db", "SNR, dB"],
      ["worst", "worst group"], ["product_rel_error", "product"]], rows, ["rel_error", true]);
  };

  const PRECISIONS = { int4: "4 bits", fp8: "FP8", original: "as it was" };
  const PRECISION_COLOURS = { int4: "#1c7ed6", fp8: "#2f9e44", original: "#e8750a" }; // the same in every plot
  const precisionName = (p) => PRECISIONS[p] ?? p;
  const precisions = () => {
    if (!doc.modules?.length) return;
    const part = section("precisions", "How modules are stored",
      "Bytes of each layer's weights with their scales, by precision; the embedding and a head of its own come first.");
    const counts = Object.keys(PRECISIONS).map((p) => [p, doc.modules.filter((m) => m.precision === p)]).filter(([, list]) => list.length);
    const total = doc.modules.reduce((sum, m) => sum + m.bytes, 0);
    const list = make("div", { class: "facts" });
    for (const [p, of] of counts) {
      const size = of.reduce((sum, m) => sum + m.bytes, 0);
      list.append(make("div", {}, make("span", {}, PRECISIONS[p]), `${counted(of.length, "module")}, ${bytes(size)} (${percent(size / total)})`));
    }
    part.append(list);
    const places = unique(doc.modules.map((m) => m.layer)).sort((a, b) => (a ?? -1) - (b ?? -1));
    const node = plotNode("bytes by layer and precision");
    part.append(node);
    plot(node, () => ({
      traces: counts.map(([p, of]) => ({ type: "bar", name: PRECISIONS[p], marker: { color: PRECISION_COLOURS[p] }, x: places.map((l) => (l === null ? "outside" : String(l))),
        y: places.map((l) => of.filter((m) => m.layer === l).reduce((sum, m) => sum + m.bytes, 0)),
        hovertemplate: "layer %{x}: %{y} bytes<extra>" + PRECISIONS[p] + "</extra>" })),
      extra: { height: 340, barmode: "stack", xaxis: { type: "category", title: { text: "layer" } }, yaxis: { title: { text: "bytes" } } },
    }));
    table(part, "modules-table", [["layer", "layer"], ["name", "module"], ["precision", "stored in", precisionName], ["bytes", "bytes"]], doc.modules, ["bytes", true]);
  };

  const plan = () => {
    if (!doc.plan?.units.length) return;
    const part = section("plan", "What choosing measured",
      `KL of each linear stored alone in 4 bits, and alone in FP8, on ${number(doc.plan.tokens)} tokens of calibration text, and what it was given. The whole plan: KL ${number(doc.plan.kl)}, ${bytes(doc.plan.bytes)}.`);
    const rows = doc.plan.units.map((u) => ({ linears: u.linears.join(" "), precision: u.precision, kl_int4: u.kl.int4, kl_fp8: u.kl.fp8 ?? null,
      bytes_int4: u.bytes.int4, bytes_fp8: u.bytes.fp8 ?? null, bytes_original: u.bytes.original }));
    const sorted = [...rows].sort((x, y) => x.kl_int4 - y.kl_int4).slice(-40);
    const node = plotNode("KL of each linear in 4 bits and in FP8");
    part.append(...titled(sorted.length < rows.length ? `The ${sorted.length} most sensitive` : "The most sensitive first", node));
    const bar = (key, p) => ({ type: "bar", orientation: "h", name: "in " + PRECISIONS[p], marker: { color: PRECISION_COLOURS[p] }, y: sorted.map((r) => r.linears), x: sorted.map((r) => r[key]), customdata: sorted.map((r) => precisionName(r.precision)),
      hovertemplate: "%{y}: KL %{x:.3g}, stored: %{customdata}<extra>in " + PRECISIONS[p] + "</extra>" });
    plot(node, () => ({ traces: [bar("kl_int4", "int4"), bar("kl_fp8", "fp8")],
      extra: { height: 140 + 22 * sorted.length, barmode: "group", xaxis: { title: { text: "KL" } }, yaxis: { type: "category" } } }));
    table(part, "plan-table", [["linears", "linear"], ["precision", "stored in", precisionName], ["kl_int4", "KL in 4 bits"], ["kl_fp8", "KL in FP8"],
      ["bytes_int4", "bytes in 4 bits"], ["bytes_fp8", "in FP8"], ["bytes_original", "as it was"]], rows, ["kl_int4", true]);
  };

  const packed = () => {
    if (!doc.packed?.length) return;
    const part = section("groups", "Groups and scales",
      "Group scales are FP8 (E4M3): below 2⁻⁶ they are subnormal and lose bits. The second-level scale lifts them; the last two columns of the table compare the share with and without it.");
    let name = "";
    const rowsOf = () => doc.packed.filter((r) => !name || r.name === name);
    const sum = (key) => rowsOf().reduce((total, r) => r[key].map((v, i) => v + (total[i] ?? 0)), []);
    const choice = select("Linear: ", [["", "all together"], ...doc.packed.map((r) => [r.name, r.name])], (v) => { name = v; nodes.forEach((n) => drawn.get(n)()); });
    const nodes = [plotNode("share of each magnitude"), plotNode("scale codes"), plotNode("largest weight of each group")];
    part.append(make("div", { class: "controls" }, choice.label), ...titled("How often each magnitude is used", nodes[0]),
      ...titled("Group scales by E4M3 code (subnormal ones in orange)", nodes[1]),
      ...titled("Top magnitude × scales of each group (about its largest weight)", nodes[2]));
    const e4m3 = (code) => { const [e, m] = [code >> 3, code & 7]; return e === 0 ? m * 2 ** -9 : (1 + m / 8) * 2 ** (e - 7); };
    plot(nodes[0], () => {
      const counts = sum("magnitude_counts");
      const all = counts.reduce((a, b) => a + b, 0);
      const labels = counts.map((_, i) => (doc.levels ? number(doc.levels[i]) : String(i)));
      return { traces: [{ type: "bar", x: labels, y: counts.map((c) => (100 * c) / all), hovertemplate: "magnitude %{x}: %{y:.2f} %<extra></extra>" }],
        extra: { height: 300, xaxis: { type: "category", title: { text: "magnitude" } }, yaxis: { title: { text: "%" } } } };
    });
    plot(nodes[1], () => {
      const counts = sum("scale_counts");
      const x = counts.map((_, code) => e4m3(code));
      return { traces: [{ type: "bar", x: x.map((v) => number(v, 3)), y: counts, customdata: counts.map((_, c) => c), marker: { color: counts.map((_, c) => (c < 8 ? "#d9480f" : "#1c7ed6")) },
        hovertemplate: "scale %{x} (code %{customdata}): %{y} groups<extra></extra>" }],
        extra: { height: 300, xaxis: { type: "category", nticks: 16, title: { text: "scale" } }, yaxis: { title: { text: "groups" } } } };
    });
    plot(nodes[2], () => {
      const counts = sum("absmax_histogram");
      const used = counts.map((c, i) => (c > 0 ? i : -1)).filter((i) => i >= 0);
      const [first, last] = [Math.max(0, (used[0] ?? 1) - 1), Math.min(counts.length, (used.at(-1) ?? 0) + 2)];
      const x = counts.map((_, i) => (i === 0 ? "< 2<sup>−16</sup>" : `2<sup>${String(i - 17).replace("-", "−")}</sup>`)).slice(first, last);
      return { traces: [{ type: "bar", x, y: counts.slice(first, last), hovertemplate: "from %{x}: %{y} groups<extra></extra>" }],
        extra: { height: 300, xaxis: { type: "category", title: { text: "at least" } }, yaxis: { title: { text: "groups" } } } };
    });
    table(part, "packed-table", [["layer", "layer"], ["name", "linear"], ["smallest_scale", "smallest scale"], ["largest_scale", "largest scale"],
      ["smallest_row_scale", "smallest row scale"], ["largest_row_scale", "largest row scale"], ["subnormal_scales", "subnormal", percent],
      ["subnormal_without_row_scale", "without second scale", percent]], doc.packed, ["subnormal_without_row_scale", true]);
  };

  // ---- the page -----------------------------------------------------------------------------------------------
  const setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    drawn.forEach((draw) => draw());
  };
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  narrow.addEventListener("change", () => drawn.forEach((draw) => draw()));
  document.getElementById("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  document.getElementById("title").textContent = doc.target;
  document.getElementById("subtitle").textContent = doc.reference ? `compared with ${doc.reference}` : "FireQ report";
  for (const draw of [facts, costs, precisions, plan, sites, channels, weights, linears, packed]) draw();
  document.body.dataset.milliseconds = Math.round(performance.now());
  document.body.dataset.ready = "yes";
})();
