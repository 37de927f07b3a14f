/** What the images are made from: classes or a found latent, seed, truncation, directions. */

import { $, button, element, fill, on, slider } from "./dom.js";
import { served, state, update } from "./state.js";

const MAX_CLASSES = 16; // Of a mixture.
const UNTRUNCATED = 2.05; // One step beyond the last truncation.
const COUNTS = [1, 4, 8, 16, 24, 32, 48, 64];
const FEW = 6; // Directions, of what may be hundreds: the strongest come first.
let directions = FEW;
let before = {}; // What a found latent was edited in the place of.

/** Shows the state, whatever was shown before. */
export function render() {
  for (const id of ["of-classes", "of-seed"]) $(id).hidden = Boolean(state.image);
  $("of-image").hidden = !state.image;
  showClasses();
  $("truncation").replaceChildren(slider({
    label: "Truncation", min: 0.1, max: UNTRUNCATED, step: 0.05,
    value: state.truncation ?? UNTRUNCATED,
    show: (value) => (state.truncation === null ? "off" : value.toFixed(2)),
    change: (value) => update({ truncation: value >= UNTRUNCATED ? null : value }),
  }));
  $("seed").value = $("seed-slider").value = state.seed;
  fill("n", [...new Set([...COUNTS, state.n])].map((n) => [n, n]), state.n);
  showDirections();
}

function showClasses() {
  const { classes } = state;
  const several = classes.length > 1;
  $("classes").replaceChildren(...classes.map((of, i) => {
    const select = element("select", { ariaLabel: several ? `Class ${i + 1}` : "Class" });
    // A link may name a class that there is not; the endpoint says so.
    const names = [...new Set([...served.classes, of[0]])];
    select.append(...names.map((name) => element("option", { value: name }, name)));
    select.value = of[0];
    select.addEventListener("change", () => {
      of[0] = select.value;
      update({});
    });
    return several ? element("div", { className: "class" }, select, removal(i), weight(of)) : select;
  }));
  $("add-class").hidden = classes.length >= Math.min(MAX_CLASSES, served.classes.length);
}

function removal(i) {
  return button("×", () => {
    update({ classes: state.classes.filter((_, j) => j !== i) });
    showClasses();
    $("add-class").focus();
  }, { className: "link", ariaLabel: `Remove class ${i + 1}` });
}

function weight(of) {
  return slider({
    label: "Weight", min: 1, max: 100, step: 1, value: of[1], show: String,
    change: (value) => {
      of[1] = value;
      update({});
    },
  });
}

on("add-class", "click", () => {
  const used = state.classes.map(([name]) => name);
  const other = served.classes.find((name) => !used.includes(name));
  update({ classes: [...(used.length > 1 ? state.classes : [[used[0], 50]]), [other, 50]] });
  showClasses();
  $("classes").lastChild.querySelector("select").focus();
});

/** Puts a found latent under the sliders, as it was found: not truncated. */
export function edit(image) {
  if (!state.image) before = { truncation: state.truncation, edits: state.edits };
  update({ image, truncation: null, edits: {} });
  render();
  $("images-title").focus();
}

on("leave-image", "click", () => {
  update({ image: null, ...before });
  render();
  $("seed").focus();
});

for (const [id, other] of [["seed", "seed-slider"], ["seed-slider", "seed"]]) {
  on(id, "input", ({ target: { value } }) => {
    if (value === "") return; // Half-way through typing.
    update({ seed: Number(value) });
    $(other).value = value;
  });
}

on("any-seed", "click", () => {
  update({ seed: crypto.getRandomValues(new Uint32Array(1))[0] });
  $("seed").value = $("seed-slider").value = state.seed;
});

on("n", "change", ({ target }) => update({ n: Number(target.value) }));

function showDirections() {
  const shown = served.directions.filter(({ name }, i) => i < directions || name in state.edits);
  $("directions").replaceChildren(...shown.map(({ name, index }) => slider({
    label: name === String(index) ? `Direction ${name}` : name,
    min: -6, max: 6, step: 0.25, value: state.edits[name] ?? 0,
    show: (value) => (value > 0 ? "+" : "") + value.toFixed(2),
    change: (value) => {
      const { [name]: _, ...others } = state.edits;
      update({ edits: value ? { ...others, [name]: value } : others });
    },
  })));
  $("more-directions").hidden = shown.length === served.directions.length;
}

on("more-directions", "click", () => {
  directions += FEW;
  showDirections();
});

on("reset-directions", "click", () => {
  update({ edits: {} });
  showDirections();
});
