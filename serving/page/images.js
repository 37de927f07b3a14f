/** The grid: images of the chosen classes, or the way from a found latent to its edits. */

import { call } from "./api.js";
import { $, Task, button, decoded, png } from "./dom.js";
import { offer } from "./output.js";
import { choose } from "./path.js";
import { mixture, round, state } from "./state.js";

const STEPS = 8; // Of the way to an edit.
const refreshing = new Task();
let asked = null; // The request whose images are shown, or on their way.

/** The request at hand: the operation, its body, and the name of its file. */
function request(format = "png") {
  const body = { model: state.model, format: format === "zip" ? "png" : format };
  if (format === "zip") body.layout = "zip";
  if (state.truncation !== null) body.truncation = state.truncation;
  if (Object.keys(state.edits).length) body.edits = state.edits;
  const file = `images.${format}`;
  if (!state.image) {
    return ["v1/generate", { ...body, class: mixture(), n: state.n, seed: state.seed }, file];
  }
  return ["v1/edit", { ...body, image: state.image, steps: body.edits ? STEPS : 1 }, file];
}

export async function refresh() {
  const [path, body] = request("json");
  if (asked === JSON.stringify(body)) return;
  asked = JSON.stringify(body);
  $("grid").ariaBusy = "true";
  const done = await refreshing.run(async (signal) => {
    const { images } = await call(path, body, signal);
    const pictures = await Promise.all(images.map(({ image, seed, latent }) =>
      decoded(png(image), classText(latent) + (seed === null ? "" : `, seed ${seed}`))));
    signal.throwIfAborted(); // The old images stay until the newest are there.
    show(images, pictures, body.truncation ?? null);
  });
  if (done === null) return;
  $("grid").ariaBusy = "false";
  if (!done) asked = null;
}

function show(images, pictures, truncation) {
  const grid = $("grid");
  while (grid.children.length > images.length) grid.lastChild.remove();
  while (grid.children.length < images.length) {
    grid.append(button("", ({ currentTarget: { point, firstChild, truncation: of } }) =>
      choose(point, firstChild.src, of), { className: "tile" }));
  }
  images.forEach(({ latent }, i) => {
    const tile = grid.children[i]; // The same as before, so that it keeps the focus.
    tile.replaceChildren(pictures[i]);
    Object.assign(tile, { point: point(latent), truncation, title: pictures[i].alt });
  });
  mark();
  $("images-status").textContent = summary(images);
}

function summary(images) {
  const more = images.length - 1;
  if (state.image) return more ? "your image, and the way to its edit" : "your image, as it was found";
  const seeds = `seed${more ? "s" : ""} ${images[0].seed}${more ? ` to ${images[more].seed}` : ""}`;
  return `class ${classText(images[0].latent)}, ${seeds}`;
}

/** Shows which images are stops. */
export function mark() {
  const stops = state.stops.map((stop) => JSON.stringify(stop));
  for (const tile of $("grid").children) {
    const place = stops.indexOf(JSON.stringify(tile.point)) + 1;
    tile.ariaPressed = String(place > 0);
    tile.dataset.stop = place;
  }
}

/** What the API takes for a stop, or for an image to edit, of a latent that it gave. */
export function point({ class: weights, seed, z, y, edits = {} }) {
  const names = Object.keys(weights ?? {}); // None where `y` alone was given.
  const made = { class: names.length === 1 ? names[0] : weights };
  Object.assign(made, z ? { z: z.map(round) } : { seed });
  if (y) made.y = y.map(round);
  if (Object.keys(edits).length) made.edits = edits;
  return made;
}

function classText({ class: weights }) {
  if (!weights) return "a given class";
  return Object.entries(weights).map(([name, weight]) =>
    weight === 1 ? name : `${Math.round(100 * weight)} % ${name}`).join(" + ");
}

offer("images", ["png", "zip"], request);
