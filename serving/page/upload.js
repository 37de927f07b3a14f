/** An image of the user's: finding its latent, upscaling it, and asking where it came from. */

import { call, events } from "./api.js";
import { edit } from "./controls.js";
import { $, Task, button, element, fill, on, png, say } from "./dom.js";
import { point } from "./images.js";
import { download, offer } from "./output.js";
import { choose } from "./path.js";
import { served, state } from "./state.js";

const MAX_BYTES = 8 * 1024 * 1024; // What the endpoint takes.
const searching = new Task();
const verifying = new Task();
let image = null; // As a data: URL.
let last = "invert"; // What was asked last.

export function render() {
  fill("upload-class", [["", "any"], ...served.classes.map((name) => [name, name])], "");
}

function request(operation = last) {
  if (operation === "verify") return ["v1/verify", { image }, "origin.json"];
  const body = { model: state.model, image, deadline: Number($("deadline").value) };
  if ($("upload-class").value) body.class = $("upload-class").value;
  if (operation === "upscale" && $("factor").value) body.factor = Number($("factor").value);
  return [`v1/${operation}`, body, "found.json"];
}

function take(file) {
  if (!file) return;
  if (file.size > MAX_BYTES) {
    say(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; the endpoint takes 8 MiB.`);
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    image = reader.result;
    Object.assign($("uploaded"), { src: image, hidden: false });
    $("drop-text").textContent = file.name;
    for (const one of $("upload").querySelectorAll(".needs-image")) one.disabled = false;
  });
  reader.readAsDataURL(file);
}

async function search(operation) {
  last = operation;
  $("cancel").hidden = $("work").hidden = false;
  $("best").hidden = true;
  $("progress").removeAttribute("value"); // How far it is is not known yet.
  $("progress-text").textContent = "";
  $("upload-status").textContent = "searching …";
  const [path, body] = request(operation);
  const done = await searching.run(async (signal) => {
    for await (const [name, data] of events(path, body, signal)) {
      if (name === "progress") showProgress(data);
      if (name === "result") showFound(data);
    }
  });
  if (done !== null) end(done ? $("upload-status").textContent : "");
}

function end(status) {
  if (document.activeElement === $("cancel")) $(last).focus();
  $("cancel").hidden = $("work").hidden = true;
  $("upload-status").textContent = status;
}

function showProgress({ step, steps, psnr, image: soFar }) {
  Object.assign($("progress"), { max: steps, value: step });
  $("progress-text").textContent = `step ${step} of ${steps}, ${psnr.toFixed(1)} dB`;
  if (soFar) Object.assign($("best"), { src: png(soFar), alt: "The best so far", hidden: false });
}

function showFound({ candidates, seconds, finished }) {
  $("found").replaceChildren(...candidates.map(candidate));
  Object.assign($("best"), { src: png(candidates[0].image), alt: "The best", hidden: false });
  const why = finished ? "" : ", when its time was up";
  $("upload-status").textContent = `${candidates.length} found in ${seconds.toFixed(1)} s${why}`;
}

function candidate(found, i) {
  const src = png(found.image);
  const latent = point(found.latent);
  const facts = `${found.psnr.toFixed(1)} dB, class ${found.class}`;
  const act = (text, press) => button(text, press, { ariaLabel: `${text}: candidate ${i + 1}` });
  return element("li", {},
    element("img", { src, alt: `Candidate ${i + 1}` }),
    element("div", {},
      element("span", { className: "quiet" }, facts),
      element("div", { className: "row" },
        act("Edit", () => edit(latent)),
        act("As stop", () => choose(latent, src, null)),
        act("PNG", () => download(src, `found-${i + 1}.png`)))));
}

on("invert", "click", () => search("invert"));
on("upscale", "click", () => search("upscale"));
on("cancel", "click", () => {
  searching.stop();
  end("cancelled");
});
on("verify", "click", () => verifying.run(async (signal) => {
  last = "verify";
  const [path, body] = request();
  const { status, detail, model, description } = await call(path, body, signal);
  const facts = [`${status}: ${detail}`, model, description].filter(Boolean);
  $("upload-status").textContent = facts.join("; ");
}));
offer("upload", [], request);

on("file", "change", ({ target }) => take(target.files[0]));
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
// Anywhere on the page: a file that is dropped beside the field would take the page's place.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
  $("upload").scrollIntoView();
});
