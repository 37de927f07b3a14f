/** The page of an endpoint: loads what is served, and keeps its parts and the link in step. */

import { call, keepKey } from "./api.js";
import * as controls from "./controls.js";
import { $, Task, fill, on, say } from "./dom.js";
import * as images from "./images.js";
import * as path from "./path.js";
import { onChange, readFragment, served, state, update } from "./state.js";
import * as upload from "./upload.js";

const SMALL = 64; // Pixels, up to which an enlarged image shows its pixels.
const LARGE = 160; // Pixels, from which images are shown smaller than they are.
const loading = new Task();

async function load(signal) {
  served.models = (await call("v1/models", null, signal)).data;
  state.model ??= first()?.id ?? null;
  await loadModel(signal);
}

/** What the endpoint serves by default: of its first name, the version that most requests get. */
function first() {
  const name = served.models[0]?.id.split("@")[0];
  const same = served.models.filter(({ id }) => id.split("@")[0] === name);
  return same.sort((a, b) => b.share - a.share)[0];
}

async function loadModel(signal) {
  served.entry = served.models.find(({ id, aliases }) =>
    [id, ...aliases.map((alias) => `${id.split("@")[0]}@${alias}`)].includes(state.model));
  showModel();
  const query = `?model=${encodeURIComponent(state.model)}`;
  const [{ classes }, { directions }] = await Promise.all(
    ["v1/classes", "v1/directions"].map((where) => call(where + query, null, signal)));
  served.classes = classes.map(({ name }) => name);
  served.directions = directions;
  if (!state.classes.length) state.classes = [[served.classes[0], 1]];
  render();
  update({});
}

function render() {
  for (const part of [controls, path, upload]) part.render();
}

function showModel() {
  const options = served.models.map(({ id, aliases }) =>
    [id, aliases.length ? `${id} (${aliases.join(", ")})` : id]);
  if (!served.entry) options.unshift([state.model, `${state.model} (not served)`]);
  fill("model", options, served.entry?.id ?? state.model);
  const { resolution = 0, channels, fid, fid_protocol: protocol, licence } = served.entry ?? {};
  const facts = served.entry ? [`${resolution} × ${resolution}${channels === 1 ? ", grey" : ""}`] : [];
  // FIDs of different features cannot be compared, so each says what it was taken with.
  if (typeof fid === "number") facts.push(`FID (${protocol.extractor}) ${fid.toFixed(2)}`);
  if (licence) facts.push(licence);
  $("facts").textContent = facts.join(" · ");
  document.body.classList.toggle("small", resolution <= SMALL);
  $("grid").style.setProperty("--side", `${Math.min(Math.max(resolution, SMALL), LARGE)}px`);
}

/** To another model, with what it knows of the state. */
on("model", "change", ({ target }) => loading.run(async (signal) => {
  state.model = target.value;
  await loadModel(signal);
  const known = (name) => served.classes.includes(name);
  const classes = state.classes.filter(([name]) => known(name));
  const names = served.directions.map(({ name }) => name);
  const stops = state.stops.filter((stop) => "seed" in stop && [stop.class].flatMap(
    (of) => (typeof of === "string" ? of : Object.keys(of ?? {}))).every(known));
  if (stops.length < state.stops.length) say(`Stops that ${state.model} cannot make are gone.`);
  update({
    classes: classes.length ? classes : [[served.classes[0], 1]],
    edits: Object.fromEntries(Object.entries(state.edits).filter(([name]) => names.includes(name))),
    stops, image: null,
  });
  controls.render();
  path.render();
}));

function start() {
  readFragment();
  render();
  loading.run(load);
}

onChange(images.refresh);
onChange(path.refresh);
Task.onLocked = () => {
  $("key-form").hidden = false;
  if (document.activeElement === document.body) $("key").focus();
};
on("key-form", "submit", (event) => {
  event.preventDefault();
  keepKey($("key").value.trim());
  $("key-form").hidden = true;
  Task.retry();
});
on("skip", "click", (event) => {
  event.preventDefault(); // The fragment is the state's.
  $("controls").focus();
});
window.addEventListener("hashchange", start);
start();
