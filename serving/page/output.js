/** A request's outcome, taken along: as a file, or as text for bash or Python that makes it. */

import { address, call, key } from "./api.js";
import { $, Task, element, on, say } from "./dom.js";

// Keys stay out of what is copied, for such text gets shared.
const VARIABLE = "BIGGAN_API_KEY";

/** Makes the buttons `PREFIX-FORMAT` download, and `PREFIX-curl` and `PREFIX-python` copy.

    `request(format)` gives the operation, its body and the file's name; without a format, of what
    is copied. */
export function offer(prefix, formats, request) {
  const saving = new Task();
  for (const format of formats) {
    on(`${prefix}-${format}`, "click", async () => {
      const [path, body, name] = request(format);
      say(`Making ${name} …`);
      await saving.run(async (signal) => download(await call(path, body, signal, "blob"), name));
      say("");
    });
  }
  for (const [language, write] of Object.entries({ curl, python })) {
    on(`${prefix}-${language}`, "click", () => copy(write(...request())));
  }
}

/** Saves a blob, or what a data: URL holds. */
export function download(content, name) {
  const made = typeof content === "string" ? null : URL.createObjectURL(content);
  element("a", { href: made ?? content, download: name }).click();
  if (made) setTimeout(() => URL.revokeObjectURL(made), 60_000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say(key() ? `Copied. It reads the key from $${VARIABLE}.` : "Copied.");
  } catch { // Without HTTPS only this machine's pages may write there: let the user copy.
    $("code-text").value = text;
    $("code").showModal();
    $("code-text").select();
  }
}

/** The body goes through stdin: no quoting, and no limit on its length. */
function curl(path, body, file) {
  const lines = [`curl --fail-with-body --silent --show-error '${address(path).replaceAll("'", "%27")}'`];
  if (key()) lines.push(`--header "Authorization: Bearer $${VARIABLE}"`);
  lines.push("--header 'Content-Type: application/json'", `--output ${file} --data-binary @- <<'JSON'`);
  return `${lines.join(" \\\n  ")}\n${JSON.stringify(body)}\nJSON\n`;
}

function python(path, body, file) {
  const keyed = key() ? `\n    headers={"Authorization": "Bearer " + os.environ["${VARIABLE}"]},` : "";
  return `${keyed && "import os\n\n"}import requests

answer = requests.post(
    "${address(path)}",
    json=${literal(body)},${keyed}
    timeout=180,
)
if not answer.ok:
    raise SystemExit(answer.text)
with open("${file}", "wb") as file:
    file.write(answer.content)
`;
}

/** A value as Python writes it; its strings may be written as JSON's are. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(([name, of]) => `${JSON.stringify(name)}: ${literal(of)}`);
  return `{${pairs.join(", ")}}`;
}
