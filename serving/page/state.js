/** What the page shows, and its place in the URL's fragment: a link gives the same view. */

const DEFAULTS = {
  model: null, // The endpoint's first.
  classes: [], // [name, weight] each; several are mixed.
  truncation: 1, // null: not truncated.
  seed: 0,
  n: 16,
  edits: {}, // Steps by the direction's name.
  image: null, // A found latent (a Point of the API), edited in the place of seeds.
  stops: [], // Points of the API.
  frames: 16,
  fps: 16,
  loop: true,
};

const { isFinite } = Number; // JSON.parse makes Infinity of 1e999.
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isList = (value, of) => Array.isArray(value) && value.every(of);
const isWeighed = (value) =>
  Array.isArray(value) && typeof value[0] === "string" && isFinite(value[1]);

/** Whether a value from a link is such that the page can show it; the endpoint judges the rest. */
const KINDS = {
  model: (value) => typeof value === "string",
  classes: (value) => isList(value, isWeighed),
  truncation: (value) => value === null || isFinite(value),
  seed: isFinite,
  n: isFinite,
  edits: (value) => isObject(value) && Object.values(value).every(isFinite),
  image: (value) => value === null || isObject(value),
  stops: (value) => isList(value, isObject),
  frames: isFinite,
  fps: isFinite,
  loop: (value) => typeof value === "boolean",
};

export const state = structuredClone(DEFAULTS);

/** What the endpoint said of the model in use. */
export const served = { models: [], entry: null, classes: [], directions: [] };

const listeners = [];
let timer;

/** Calls `listener` shortly after the last of a row of changes. */
export const onChange = (listener) => listeners.push(listener);

export function update(changes) {
  Object.assign(state, changes);
  clearTimeout(timer);
  timer = setTimeout(() => {
    history.replaceState(null, "", toFragment());
    for (const listener of listeners) listener();
  }, 120);
}

/** Short enough for a link, and far finer than a grey level. */
export const round = (value) => Math.round(value * 1e4) / 1e4;

/** The class, or weights with the sum of 1, as the API is asked for them. */
export function mixture() {
  if (state.classes.length === 1) return state.classes[0][0];
  const total = state.classes.reduce((sum, [, weight]) => sum + weight, 0);
  return Object.fromEntries(state.classes.map(([name, w]) => [name, round(w / total)]));
}

function toFragment() {
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const changed = Object.entries(state).filter(([name, value]) => text(value) !== text(DEFAULTS[name]));
  return `#${new URLSearchParams(changed.map(([name, value]) => [name, text(value)]))}`;
}

/** Sets the state from a link; what is not of the right kind there stays as it is by default. */
export function readFragment() {
  Object.assign(state, structuredClone(DEFAULTS));
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!Object.hasOwn(KINDS, name)) continue;
    try {
      const value = name === "model" ? text : JSON.parse(text);
      if (KINDS[name](value)) state[name] = value;
    } catch {} // A damaged link gives what it can.
  }
}
