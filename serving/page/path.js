/** Interpolation: stops, and the animation of the way through them. */

import { call } from "./api.js";
import { $, Task, button, decoded, element, on, png, slider } from "./dom.js";
import { mark } from "./images.js";
import { offer } from "./output.js";
import { served, state, update } from "./state.js";

const SIDE = 256; // Pixels of an animation, or as near below as a whole factor comes.
const MAX_SCALE = 16;
const FORMATS = ["webp", "gif", "mp4"];
const pictures = new Map(); // By stop: its picture, and of which model and truncation it is.
const picturing = new Task();
const animating = new Task();
let playing = null; // The request whose animation plays.

const under = (truncation) => JSON.stringify([state.model, truncation]);

function request(format = "webp") {
  const { model, stops, frames, fps, loop } = state;
  const scale = Math.min(Math.max(Math.floor(SIDE / served.entry?.resolution), 1) || 1, MAX_SCALE);
  const body = { model, stops, frames, fps, loop, scale, format };
  if (state.truncation !== null) body.truncation = state.truncation;
  return ["v1/interpolate", body, `path.${format}`];
}

/** Makes a point a stop, or no longer one; `src` is its picture under a truncation. */
export function choose(stop, src, truncation) {
  const text = JSON.stringify(stop);
  const others = state.stops.filter((other) => JSON.stringify(other) !== text);
  pictures.set(text, { src, of: under(truncation) });
  update({ stops: others.length < state.stops.length ? others : [...state.stops, stop] });
  showStops();
}

function remove(place) {
  update({ stops: state.stops.filter((_, i) => i !== place) });
  showStops();
  ($("stops").children[Math.min(place, state.stops.length - 1)]?.lastChild ?? $("path-title")).focus();
}

export function render() {
  showStops();
  const kinds = [["Frames between stops", "frames", 2, 64], ["Frames a second", "fps", 1, 50]];
  $("path-sliders").replaceChildren(...kinds.map(([label, name, min, max]) => slider({
    label, min, max, step: 1, value: state[name], show: String,
    change: (value) => update({ [name]: value }),
  })));
  $("loop").checked = state.loop;
}

function showStops() {
  $("stops").replaceChildren(...state.stops.map((stop, i) => {
    const known = pictures.get(JSON.stringify(stop));
    const image = element("img", { alt: `Stop ${i + 1}`, ...(known && { src: known.src }) });
    const name = `Remove stop ${i + 1}`;
    return element("li", {}, image, button("×", () => remove(i), { ariaLabel: name, title: name }));
  }));
  const few = state.stops.length < 2;
  for (const id of [...FORMATS, "curl", "python"]) $(`path-${id}`).disabled = few;
  $("play").disabled = few;
  $("clear-stops").disabled = !state.stops.length;
  if (few) halt();
  mark();
}

/** Brings pictures of stops, and what plays, up to date with the state. */
export function refresh() {
  const now = under(state.truncation);
  const missing = state.stops.filter((stop) => pictures.get(JSON.stringify(stop))?.of !== now);
  if (missing.length) picturing.run((signal) => picture(missing, now, signal));
  if (playing && playing !== JSON.stringify(request())) play();
}

async function picture(stops, now, signal) {
  const { model, truncation } = state;
  const asked = { model, format: "json", ...(truncation !== null && { truncation }) };
  await Promise.all(stops.map(async (image) => {
    const answer = await call("v1/edit", { ...asked, image }, signal);
    pictures.set(JSON.stringify(image), { src: png(answer.images[0].image), of: now });
  }));
  showStops();
}

async function play() {
  const [path, body] = request();
  playing = JSON.stringify(request());
  $("path-status").textContent = "making it …";
  const done = await animating.run(async (signal) => {
    const src = URL.createObjectURL(await call(path, body, signal, "blob"));
    await decoded(src, "");
    signal.throwIfAborted();
    URL.revokeObjectURL($("player").src);
    const alt = `Animation through ${body.stops.length} stops`;
    Object.assign($("player"), { src, alt, hidden: false });
    $("play").textContent = "Stop";
    $("path-status").textContent = "plays";
  });
  if (done === false) halt();
}

/** Ends the animation: nothing has to move. */
function halt() {
  animating.controller?.abort();
  playing = null;
  $("player").hidden = true;
  $("play").textContent = "Play";
  $("path-status").textContent = state.stops.length < 2 ? "press images above to make them stops" : "";
}

on("play", "click", () => (playing ? halt() : play()));
on("loop", "change", ({ target }) => update({ loop: target.checked }));
on("clear-stops", "click", () => {
  update({ stops: [] });
  showStops();
  $("path-title").focus();
});
offer("path", FORMATS, request);
