const data = JSON.parse(document.getElementById("numbers").textContent);
const one = (query) => document.querySelector(query), items = [...document.querySelectorAll(".item")];
const names = { before: "along, unsteered", after: "along, steered", added: "moved by", gate: "gate" };
let chosen = null;

const short = (x) => {
  const size = Math.abs(x), far = size >= 1e5 || (size > 0 && size < 1e-3);
  return x === null ? "–" : (far ? x.toExponential(1) : String(+x.toPrecision(3))).replace("-", "−");
};
const percent = (x) => (x === null ? "–" : `${short(100 * x)} %`);
const shown = (what, x) => (what === "added" ? percent(x) : short(x));
const state = () => [one("[name=measure]:checked").value, +one("#site").value, +one("#concept").value];

// What was measured of an item: null where it was not in that run, or has no such number.
function number(item, what, site, concept) {
  const [plain, steered] = data.items[item.dataset.t], place = item.dataset.i, run = item.dataset.r;
  if (what === "before" || what === "after") {
    const from = run === "plain" || (run === "both" && what === "before") ? plain : steered;
    return from.along[site][concept]?.[place] ?? null;
  }
  if (run === "plain") return null;
  return (what === "added" ? steered.added[site] : steered.gate[site][concept])?.[place] ?? null;
}

const scaled = (what, site, concept) =>
  what === "gate" ? 1 : what === "added" ? data.scale.added[site] : data.scale.along[site][concept];
function tint(element, what, x, scale) {
  const share = x === null || !scale ? 0 : Math.max(-1, Math.min(1, x / scale));
  element.dataset.hue = what === "added" || what === "gate" ? what : share < 0 ? "minus" : "plus";
  element.style.setProperty("--share", Math.abs(share).toFixed(2));
}

function paint() {
  const [what, site, concept] = state(), scale = scaled(what, site, concept);
  for (const item of items) {
    const x = number(item, what, site, concept);
    tint(item, what, x, scale);
    const told = `${names[what]} ${data.concepts[concept]} at ${data.sites[site]}: ${shown(what, x)}`;
    const differs = item.classList.contains("differs") ? ", differs" : "";
    item.setAttribute("aria-label", `${item.dataset.kind} ${item.dataset.w}${differs}, ${told}`);
    for (const label of item.querySelectorAll(".value")) label.textContent = shown(what, x);
  }
  const signed = what === "before" || what === "after";
  one("#low").textContent = signed ? shown(what, scale && -scale) : "0";
  one("#high").textContent = shown(what, scale);
  one("#ramp").dataset.hue = signed ? "signed" : what;
  if (chosen) tell(chosen);
}

function tell(item) { // its numbers at every site
  const [, now, concept] = state();
  const { kind, w, place: where } = item.dataset;
  one("#chosen").textContent = kind === "token" ? w : "";
  one("#where").textContent = where;
  const rows = data.short.map((site, place) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    row.append(Object.assign(head, { scope: "row", textContent: site }));
    row.className = place === now ? "now" : "";
    for (const what of Object.keys(names).filter((name) => name !== "gate" || data.gated)) {
      const run = item.dataset.r, apart = (what === "before" && run === "steered") || (what === "after" && run === "plain");
      const cell = document.createElement("td"), x = apart ? null : number(item, what, place, concept);
      row.append(Object.assign(cell, { textContent: shown(what, x) }));
      tint(cell, what, x, scaled(what, place, concept));
    }
    return row;
  });
  one("#every").replaceChildren(...rows);
  one("#panel").dataset.empty = "no";
  one("#panel .scrolls").scrollTop = rows[now].offsetTop - one("#panel .scrolls").clientHeight / 2;
}

function choose(item) {
  chosen?.removeAttribute("aria-current");
  chosen = chosen === item ? null : item; // once more closes it
  if (!chosen) return void (one("#panel").dataset.empty = "yes");
  chosen.setAttribute("aria-current", "true");
  tell(chosen);
}
function focus(item) {
  for (const other of items) other.tabIndex = other === item ? 0 : -1;
  item.focus();
}
function nearest(item, up) {
  const here = item.getBoundingClientRect();
  const far = (box) => 1000 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left);
  const there = items.map((own) => [own, own.getBoundingClientRect()])
    .filter(([, box]) => (up ? box.bottom <= here.top + 1 : box.top >= here.bottom - 1));
  return there.sort((a, b) => far(a[1]) - far(b[1]))[0]?.[0];
}
document.addEventListener("keydown", (event) => {
  const select = one("#site"), place = items.indexOf(event.target), turn = { "[": -1, "]": 1 }[event.key];
  if (turn) select.selectedIndex = Math.max(0, Math.min(select.length - 1, select.selectedIndex + turn)), paint();
  if (place < 0) return;
  const next = { ArrowLeft: items[place - 1], ArrowRight: items[place + 1], Home: items[0], End: items.at(-1) }[event.key]
    ?? (event.key.match(/^Arrow(Up|Down)$/) ? nearest(event.target, event.key === "ArrowUp") : null);
  if (next) event.preventDefault(), focus(next);
});
for (const item of items) item.addEventListener("click", () => (focus(item), choose(item)));
for (const input of document.querySelectorAll("[name=measure], select")) input.addEventListener("change", paint);
items[0].tabIndex = 0, paint();
