/** What the parts of the page share: elements, sliders, and tasks with their problems. */

import { Problem } from "./api.js";

export const $ = (id) => document.getElementById(id);
export const on = (id, event, listener) => $(id).addEventListener(event, listener);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function button(text, press, properties) {
  const made = element("button", { type: "button", ...properties }, text);
  made.addEventListener("click", press);
  return made;
}

let sliders = 0;

/** A labelled slider; `show` gives the text of a value, `change` is called with each new one. */
export function slider({ label, min, max, step, value, show, change }) {
  const id = `slider-${++sliders}`;
  const shown = element("span", { className: "value", ariaHidden: "true" }); // The slider says it.
  const input = element("input", { type: "range", id, min, max, step, value });
  const tell = (now) => (shown.textContent = input.ariaValueText = show(now));
  input.addEventListener("input", () => {
    change(Number(input.value));
    tell(Number(input.value));
  });
  tell(value);
  return element("div", { className: "slider" }, element("label", { htmlFor: id }, label), shown, input);
}

/** Fills a select with `[value, text]` each. */
export function fill(id, options, value) {
  $(id).replaceChildren(...options.map(([v, text]) => element("option", { value: v }, text)));
  $(id).value = value;
}

export const png = (base64) => `data:image/png;base64,${base64}`;

/** A picture that is ready to be shown. */
export async function decoded(src, alt) {
  const image = element("img", { src, alt, draggable: false });
  await image.decode();
  return image;
}

let quiet;

/** Tells something that needs no answer. */
export function say(text) {
  $("said").textContent = text;
  clearTimeout(quiet);
  quiet = setTimeout(() => ($("said").textContent = ""), 6000);
}

/** Work of one kind, of which the newest wins; what went wrong shows until it goes well. */
export class Task {
  static failed = new Set();
  static onLocked;

  /** Runs `work(signal)` in the place of what ran: true if it went well, null if it was ended. */
  async run(work) {
    this.controller?.abort();
    const { signal } = (this.controller = new AbortController());
    this.work = work;
    for (let attempt = 1; ; attempt++) {
      try {
        await work(signal);
        signal.throwIfAborted();
        this.settle();
        return true;
      } catch (error) {
        if (signal.aborted) return null;
        if (!(error instanceof Problem)) throw error;
        const again = attempt < 5 && error.retryAfter <= 30;
        this.tell(error, again ? [`Trying again in ${error.retryAfter} s.`] : []);
        if (error.status === 401) Task.onLocked();
        if (!again) return false;
        await new Promise((resolve) => setTimeout(resolve, error.retryAfter * 1000));
        if (signal.aborted) return null;
      }
    }
  }

  /** Ends it, and takes back what it told. */
  stop() {
    this.controller?.abort();
    this.settle();
  }

  static retry() {
    for (const task of [...Task.failed]) task.run(task.work);
  }

  tell({ title, message, errors }, next) {
    this.settle();
    Task.failed.add(this);
    const lines = [message, ...errors, ...next].map((line) => element("span", {}, line));
    this.shown = element("div", { className: "problem" },
      element("div", {}, element("strong", {}, title), ...lines),
      button("Dismiss", () => this.settle(), { className: "link" }));
    $("problems").append(this.shown);
  }

  settle() {
    Task.failed.delete(this);
    this.shown?.remove();
  }
}
