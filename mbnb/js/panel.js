// The panel's face. It holds nothing: what it shows comes from the traits, what is pressed goes to Python as a message. All text is set by textContent.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777"];
const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3], [12, 4], [4, 2], [1, 4]];
const LIVE = ["starting", "queued", "running", "paused", "stopping"];

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k === "on") for (const [event, f] of Object.entries(v)) node.addEventListener(event, f);
    else if (k === "class") node.className = v;
    else if (k.includes("-")) node.setAttribute(k, v);
    else if (["value", "checked", "selected"].includes(k)) { if (v !== false) node.setAttribute(k, v === true ? "" : v); }      // as attributes, so that `fill` sees a change
    else node[k] = v;
  }
  node.append(...children.filter(c => c !== null && c !== undefined).map(c => c instanceof Node ? c : String(c)));
  return node;
}
const nameOf = node => node.dataset.name || node.getAttribute("aria-label") || node.textContent;
function fill(node, ...children) {       // what is the same stays, and so does the control that has the focus: a press or a word that is half done outlives the update
  if (node.childNodes.length === children.length && children.every((c, i) => c.isEqualNode(node.childNodes[i]))) return node;
  const active = document.activeElement;
  if (active !== node && node.contains(active)) fillAround(active, node, children); else node.replaceChildren(...children);
  return node;
}
function fillAround(active, node, children) {
  const same = n => n.tagName === active.tagName && nameOf(n) === nameOf(active);
  const own = [...node.childNodes].find(c => c.contains(active));
  const at = children.findIndex(c => c.nodeType === 1 && (same(c) || [...c.querySelectorAll(active.tagName)].some(same)));
  if (at < 0) { node.replaceChildren(...children); return; }                // the control is gone
  for (const c of [...node.childNodes]) if (c !== own) c.remove();
  own.before(...children.slice(0, at)); own.after(...children.slice(at + 1));
  if (own !== active) { own.className = children[at].className; fillAround(active, own, [...children[at].childNodes]); }
  else if (own.tagName === "BUTTON") { own.disabled = children[at].disabled; for (const { name, value } of children[at].attributes) own.setAttribute(name, value); }
}
const isDark = node => {
  const parts = getComputedStyle(node).backgroundColor.match(/[\d.]+/g);
  return !!parts && (0.3 * parts[0] + 0.6 * parts[1] + 0.1 * parts[2]) < 110;
};

// ---- charts ----
function drawChart(box, chart, state) {
  const key = JSON.stringify([chart.names, chart.x_name, state.log, box.clientWidth, state.dark]);
  const data = [chart.x, ...chart.ys].map(a => Array.from(a, v => Number.isFinite(v) && !(state.log && a !== chart.x && v <= 0) ? v : null));
  state.marks = chart.marks || [];
  if (state.plot && state.key === key) { state.plot.setData(data); return; }
  if (state.plot) state.plot.destroy();
  const ink = state.dark ? "#ccc" : "#444", grid = state.dark ? "#444" : "#e3e3e3";
  const series = chart.names.map((name, i) => ({
    label: name, show: true, class: name.includes("SE") ? "mbnb-hide" : undefined, stroke: chart.colors[i] < 0 ? (state.dark ? "#888" : "#aaa") : COLORS[chart.colors[i] % COLORS.length], width: chart.widths[i], dash: DASHES[chart.dashes[i] % DASHES.length],
    points: { show: chart.points[i], size: 5 }, value: (u, v) => v === null || v === undefined ? "" : Number(v).toPrecision(4), spanGaps: true }));
  const drawMarks = u => {
    u.ctx.save(); u.ctx.strokeStyle = ink; u.ctx.fillStyle = ink; u.ctx.setLineDash([3, 3]); u.ctx.font = `${10 * devicePixelRatio}px sans-serif`;
    for (const m of state.marks) {
      const x = u.valToPos(m.x, "x", true);
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.beginPath(); u.ctx.moveTo(x, u.bbox.top); u.ctx.lineTo(x, u.bbox.top + u.bbox.height); u.ctx.stroke();
      u.ctx.fillText(m.text, x + 3, u.bbox.top + 10 * devicePixelRatio);
    }
    u.ctx.restore();
  };
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "11px sans-serif", size: 52, values: (u, ticks) => ticks.map(v => v === null ? "" : String(+v.toPrecision(6))) };
  state.key = key;
  state.plot = new uPlot({
    width: Math.max(200, box.clientWidth), height: 118, series: [{ label: chart.x_name, value: (u, v) => v === null || v === undefined ? "" : String(+Number(v).toPrecision(6)) }, ...series],
    bands: chart.bands.map(b => ({ series: [b[0] + 1, b[1] + 1], fill: "rgba(0,114,178,.15)" })),
    scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } }, axes: [{ ...axis, size: 24 }, axis], cursor: { sync: { key: "mbnb" + chart.x_name }, drag: { x: true, y: false } }, hooks: { draw: [drawMarks] },
  }, data, box);
}

// ---- one panel ----
function render({ model, el: root }) {
  const send = (action, more = {}) => model.send({ action, ...more });
  const ui = { tab: "Epochs", open: new Set(), log: false, sort: null, charts: {}, waiting: 0, tick: 0 };
  const box = el("div", { class: "mbnb", role: "region", "aria-label": "training panel" });
  root.append(box);
  const twin = () => document.querySelectorAll(`[data-mbnb-twin="${model.get("panel_id")}"]`).forEach(n => { n.style.display = "none"; });

  const parts = {};
  for (const name of ["head", "controls", "message", "setup", "checks", "strip", "axes", "charts", "tabs", "tab"]) box.append(parts[name] = el("div", { class: { head: "mbnb-row", controls: "mbnb-row", strip: "mbnb-row", axes: "mbnb-row", message: "mbnb-message", tabs: "mbnb-row", charts: "mbnb-charts", tab: "mbnb-tab" }[name] || "" }));
  parts.message.setAttribute("role", "status");

  const button = (text, action, enabled, main = false, ask = "") => el("button", { class: main ? "mbnb-main" : "", disabled: !enabled, type: "button", on: { click: () => { if (!ask || window.confirm(ask)) send(action); } } }, text);

  function head() {
    const v = model.get("view");
    const chip = el("span", { class: `mbnb-chip mbnb-state ${v.state}` }, v.state || "no run");
    fill(parts.head, el("span", { class: "mbnb-name" }, v.run || "new run"), chip, el("span", { class: "mbnb-soft" }, v.reason || ""), ...(v.chips || []).map(c => el("span", { class: "mbnb-chip", title: c }, c)));
  }
  function controls() {
    const v = model.get("view"), s = v.state, live = LIVE.includes(s), setup = v.page === "setup";
    const pick = el("select", { "aria-label": "run to show", on: { change: e => send("attach", { run: e.target.value }) } }, el("option", { value: "" }, "runs …"), ...(v.runs || []).map(r => el("option", { value: r.id, selected: r.id === v.run }, `${r.id} (${r.state})`)));
    pick.style.maxWidth = "260px";
    fill(parts.controls, button(setup ? "Show the run" : "New run", setup ? "show_run" : "show_setup", setup ? !!v.run : true), button(v.checking ? "Looking …" : "Preflight", "preflight", setup && v.valid && !v.checking), button("Start", "start", setup && !v.busy && v.valid && !v.blocked, true),
      button("Pause", "pause", s === "running"), button("Resume", "resume", ["paused", "stopped", "crashed", "failed"].includes(s)), button("Stop", "stop", live && s !== "starting" && s !== "stopping"),
      button("Stop now", "stop_now", live, false, "Stop at once? The run goes back to its last checkpoint when it is resumed."), button("lr × 0.5", "halve", s === "running" || s === "paused"), button("Fork from best", "fork", v.forkable), pick);
  }
  function setup() {
    const f = model.get("form"), show = model.get("view").page === "setup";
    parts.setup.style.display = show ? "" : "none";
    for (const n of ["strip", "axes", "charts", "tabs", "tab"]) parts[n].style.display = show ? "none" : "";
    if (!show) return;
    const changed = (name, value) => send("set", { name, value });
    const control = x => {
      const common = { title: x.help, "data-name": x.name, on: { change: e => changed(x.name, x.kind === "bool" ? e.target.checked : e.target.value) } };
      if (x.choices) return el("select", common, ...x.choices.map(c => el("option", { value: c, selected: String(c) === String(x.value) }, c === "" ? "(preset)" : c)));
      if (x.kind === "bool") return el("input", { ...common, type: "checkbox", checked: x.value });
      return el("input", { ...common, type: x.kind === "int" || x.kind === "float" ? "number" : "text", step: x.kind === "int" ? 1 : "any", value: x.value });
    };
    const at = parts.setup.querySelector(".mbnb-form")?.scrollTop || 0;
    const sections = f.sections.flatMap(s => [el("h4", {}, s.title), ...s.fields.map(x => el("label", { class: x.set ? "set" : "", title: x.help }, el("span", {}, x.name.split(".").pop()), control(x)))]);
    const copy = text => el("button", { type: "button", on: { click: e => navigator.clipboard.writeText(text).then(() => { e.target.textContent = "copied"; }) } }, "copy");
    const grid = el("div", { class: "mbnb-form" }, ...sections);
    fill(parts.setup, grid, el("div", { class: "mbnb-row" }, el("pre", { class: "mbnb-command" }, f.command), copy(f.command)), el("div", { class: "mbnb-row" }, el("pre", {}, f.snippet), copy(f.snippet)));
    grid.scrollTop = at;
  }
  function checks() {
    const v = model.get("view"), show = v.page === "setup";
    parts.checks.style.display = show && (v.checked || v.checking) ? "" : "none";
    if (!show) return;
    const anyway = v.error ? [el("label", { class: "mbnb-row" }, el("input", { type: "checkbox", checked: v.anyway, "aria-label": "run anyway", on: { change: e => send("anyway", { value: e.target.checked }) } }), " run anyway: the result is then marked invalid (-p doctor warn)")] : [];
    fill(parts.checks, ...(v.checking ? [el("p", { class: "mbnb-soft" }, "The doctor looks at data, plan and untrained model …")] : (v.cards || []).length ? (v.cards || []).map(c => card(c, false)) : [el("p", { class: "mbnb-soft" }, "The doctor found nothing to say before the first step.")]), ...anyway);
  }
  function strip() {
    const s = model.get("view").strip || {};
    const bits = (s.facts || []).map(([k, v]) => el("span", {}, el("span", { class: "mbnb-soft" }, k + " "), v));
    const pips = s.patience ? [el("span", { title: "epochs without improvement" }, el("span", { class: "mbnb-soft" }, "patience "), el("span", { class: "mbnb-pips" }, s.patience > 12 ? "" : "●".repeat(Math.min(s.flat, s.patience)) + "○".repeat(Math.max(0, s.patience - s.flat))), ` ${s.flat} of ${s.patience}`)] : [];
    fill(parts.strip, ...(s.epochs ? [el("progress", { max: s.epochs, value: s.done, "aria-label": "epochs" })] : []), ...bits, ...pips);
  }
  function axes() {
    if (parts.axes.childElementCount) return;
    const choose = el("select", { "aria-label": "x axis", on: { change: e => send("axis", { value: e.target.value }) } }, ...["step", "epoch", "minutes", "samples"].map(x => el("option", { value: x }, x)));
    const smooth = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: model.get("smoothing"), "aria-label": "smoothing", on: { change: e => send("smoothing", { value: +e.target.value }) } });
    const log = el("input", { type: "checkbox", on: { change: e => { ui.log = e.target.checked; charts(); } } });
    fill(parts.axes, el("label", {}, "x ", choose), el("label", {}, "smoothing ", smooth), el("label", {}, log, " log y (loss)"));
  }
  function charts() {
    const meta = model.get("charts"), bytes = model.get("data"), show = model.get("view").page !== "setup";
    if (!show || !meta.length) return;
    const all = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    const take = ([a, n]) => all.subarray(a, a + n);
    box.classList.toggle("dark", isDark(box));
    for (const m of meta) {
      const c = ui.charts[m.id] ??= (() => {
        const pick = m.choices ? el("select", { "aria-label": "what the fourth chart shows", on: { change: e => send("extra", { value: e.target.value }) } }, ...m.choices.map(x => el("option", { value: x }, x))) : null;
        const made = { title: el("span"), plot: el("div"), empty: el("div", { class: "mbnb-empty" }), state: {} };
        parts.charts.append(el("div", { class: "mbnb-chart", "data-chart": m.id }, el("div", { class: "mbnb-chart-head" }, made.title, pick), made.plot, made.empty));
        return made;
      })();
      c.title.textContent = m.title;
      const x = take(m.x), ys = m.ys.map(take);
      c.empty.textContent = x.length ? "" : m.empty;
      c.plot.style.visibility = x.length ? "" : "hidden";
      c.state.log = ui.log && m.id === "loss"; c.state.dark = box.classList.contains("dark");
      if (x.length) drawChart(c.plot, { ...m, x, ys }, c.state);
    }
  }
  function table(t) {
    if (!t || !t.rows.length) return el("p", { class: "mbnb-soft" }, "No epoch has ended yet.");
    const rows = [...t.rows];
    if (ui.sort) rows.sort((a, b) => (a.cells[ui.sort[0]] < b.cells[ui.sort[0]] ? -1 : 1) * ui.sort[1]);
    const order = i => () => { ui.sort = ui.sort && ui.sort[0] === i ? [i, -ui.sort[1]] : [i, 1]; tabs(); };
    const header = t.columns.map((c, i) => el("th", {}, c && el("button", { type: "button", on: { click: order(i) } }, c)));
    return el("table", {}, el("thead", {}, el("tr", {}, ...header)), el("tbody", {}, ...rows.map(r => el("tr", { class: r.best ? "best" : "" }, ...r.cells.map((c, i) => el("td", { class: r.marks[i] || "", title: r.marks[i] === "noise" ? "within two standard errors of the epoch before" : "" }, c === null ? "" : c))))));
  }
  const card = (c, buttons = true) => {
    const line = (name, text) => text ? el("p", {}, el("span", { class: "mbnb-soft" }, name + ": "), text) : null;
    const patch = Object.entries(c.patch || {}).map(([k, x]) => `${k}=${x}`).join(", ");
    const press = (text, action) => el("button", { type: "button", "aria-label": `${text} ${c.id}`, on: { click: () => send(action, { id: c.id }) } }, text);
    return el("details", { class: `mbnb-card ${c.severity}`, open: ui.open.has(c.id), on: { toggle: e => { e.target.open ? ui.open.add(c.id) : ui.open.delete(c.id); } } },
      el("summary", {}, el("b", {}, `${c.severity} ${c.id} ${c.title || ""}${c.muted ? " (muted)" : ""} `), c.message), line("advice", c.fix), line("in a fork", patch), line("where", c.evidence), line("why it matters", c.why),
      buttons ? el("div", { class: "mbnb-row" }, patch ? press("Fix in the next fork", "fix") : null, press("Mute in the next fork", "mute")) : null);
  };
  const hue = behavior => { const all = model.get("view").behaviors || []; return COLORS[Math.max(0, all.indexOf(behavior)) % COLORS.length]; };
  const event = ([item, behavior]) => { const n = el("span", { class: "mbnb-event", title: behavior }, item, el("span", { class: "mbnb-soft" }, " " + behavior)); n.style.borderLeftColor = hue(behavior); return n; };
  const caseCard = c => el("div", { class: "mbnb-case" }, el("b", {}, c.user), " ", ...c.history.map(event),
    el("div", {}, "next: ", el("b", {}, c.target), ` (${c.behavior})  rank by epoch: ${c.ranks.join(" → ") || "-"}`), c.top.length ? el("div", {}, "top 10: ", ...c.top.flatMap(i => [el("span", { class: i === c.target ? "mbnb-hit" : "" }, i), ", "]).slice(0, -1)) : null);
  function tabs() {
    const v = model.get("view"), names = ["Epochs", `Doctor (${(v.cards || []).length})`, "Cases", "Rules", "Command"];
    const at = names.find(n => n.startsWith(ui.tab)) || names[0];
    fill(parts.tabs, ...names.map(n => el("button", { type: "button", role: "tab", "aria-selected": String(n === at), on: { click: () => { ui.tab = n.split(" ")[0]; tabs(); } } }, n)));
    const scroll = parts.tab.scrollTop;
    const body = { Epochs: () => [table(v.epochs)], Doctor: () => (v.cards || []).length ? [...(v.ahead ? [el("p", { class: "mbnb-soft" }, "For the next fork: ", v.ahead)] : []), ...v.cards.map(c => card(c))] : [el("p", { class: "mbnb-soft" }, "This run has no doctor cards.")],
      Cases: () => (v.cases || []).length ? v.cases.map(caseCard) : [el("p", { class: "mbnb-soft" }, "No cases yet.")], Rules: () => [table(v.rules)], Command: () => [el("pre", {}, v.command || "")] };
    fill(parts.tab, ...body[ui.tab]());
    parts.tab.scrollTop = scroll;
  }
  const message = () => { parts.message.textContent = model.get("view").message || ""; };
  const all = () => { ui.waiting = 0; twin(); head(); controls(); message(); setup(); checks(); strip(); axes(); tabs(); charts(); };

  model.on("change:view", all); model.on("change:form", setup); model.on("change:data", charts); model.on("msg:custom", m => { if (m.tick) ui.waiting = 0; });
  const visible = () => document.visibilityState === "visible" && root.isConnected && root.getClientRects().length > 0;
  const timer = setInterval(() => {                       // the panel asks, at most four times a second and only while it can be seen
    if (!visible()) return;
    twin();
    if (ui.waiting && Date.now() - ui.waiting < 4000) return;
    ui.waiting = Date.now(); send("tick");
  }, 300);
  const resized = new ResizeObserver(() => charts());
  resized.observe(box);
  all();
  return () => { clearInterval(timer); resized.disconnect(); Object.values(ui.charts).forEach(c => c.state.plot?.destroy()); };
}
export default { render };
