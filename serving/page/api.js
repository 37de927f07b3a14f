/** The endpoint: requests, its problems, and the events of long work. */

const KEY = "biggan-api-key";

/** What the endpoint, or the way to it, has against a request. */
export class Problem extends Error {
  constructor(status, title, detail, errors = [], retryAfter = NaN) {
    super(detail);
    // Mostly the detail says already what is wrong with each field.
    const more = errors.filter(({ limit }) => !detail.includes(limit));
    Object.assign(this, { status, title, retryAfter });
    this.errors = more.map(({ field, limit }) => `${field}: ${limit}`);
  }
}

export const key = () => sessionStorage.getItem(KEY);
export const keepKey = (value) => sessionStorage.setItem(KEY, value);

/** Where an operation is; the page may lie below a prefix. */
export const address = (path) => new URL(path, document.baseURI).href;

/** What answers a POST of `body`, or a GET without one, as json or blob; throws `Problem`. */
export async function call(path, body, signal, as = "json") {
  const response = await send(path, body, signal);
  return reached(response[as](), signal);
}

async function send(path, body, signal) {
  const options = { signal, headers: key() ? { Authorization: `Bearer ${key()}` } : {} };
  if (body) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    options.headers["Content-Type"] = "application/json";
  }
  const response = await reached(fetch(address(path), options), signal);
  if (response.ok) return response;
  const text = await reached(response.text(), signal);
  let told = {};
  try {
    told = JSON.parse(text);
  } catch {} // From a proxy on the way, perhaps.
  const { title = `Error ${response.status}`, detail = text.slice(0, 500), errors } = told;
  const retryAfter = Number(response.headers.get("Retry-After") ?? NaN);
  throw new Problem(response.status, title, detail, errors, retryAfter);
}

/** The events of long work, `[name, data]` each; throws `Problem`, also one that is an event. */
export async function* events(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", name; ; ) {
    const { value, done } = await reached(reader.read(), signal);
    if (done && name === "result") return;
    if (done) throw new Problem(0, "Broken off", "The endpoint ended the work without a result.");
    const parts = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const field = (of) => RegExp(`^${of}: ?(.*)$`, "m").exec(part)?.[1];
      if (!field("data")) continue; // A comment that keeps the connection open.
      name = field("event");
      const data = JSON.parse(field("data"));
      if (name === "problem") throw new Problem(data.status, data.title, data.detail, data.errors);
      yield [name, data];
    }
  }
}

/** What a promise of the network gives; fetch itself says no more than that it failed. */
async function reached(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, "Not reached", `${address("")} gave no answer: ${error.message}`);
  }
}
