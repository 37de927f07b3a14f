"""The endpoint's page in a real browser, against what the API itself answers."""

import base64
import contextlib
import io
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import Error, expect

N = 16


def first(served, **changes):
    """What the page asks for at first, changed."""
    return {"class": served["classes"][0], "n": N, "seed": 0, "truncation": 1.0} | changes


@pytest.fixture(scope="session")
def api(page_url):
    """POSTs JSON to the endpoint; the answer, which must be a success."""

    def post(path, body):
        response = requests.post(f"{page_url}/v1/{path}", json=body, timeout=60)
        assert response.ok, response.text
        return response

    return post


@pytest.fixture(scope="session")
def served(page_url):
    """The first model: its entry of /v1/models, with its classes and directions."""
    entry = requests.get(f"{page_url}/v1/models", timeout=60).json()["data"][0]
    for what in ("classes", "directions"):
        answer = requests.get(f"{page_url}/v1/{what}", {"model": entry["id"]}, timeout=60)
        entry[what] = [one["name"] for one in answer.json()[what]]
    return entry


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def decode(text):
    return pixels(base64.b64decode(text.split(",")[-1]))


def from_api(api, body):
    """The images that the API makes of a request."""
    answer = api("generate", {**body, "format": "json"}).json()
    return np.stack([decode(item["image"]) for item in answer["images"]])


def in_grid(page):
    """The images that the page shows."""
    sources = page.eval_on_selector_all(".tile img", "all => all.map(one => one.src)")
    return np.stack([decode(source) for source in sources])


def alike(a, b):
    """Whether images are the same to within the one grey level that a batch may change."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def wait_for(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def shows(page, images):
    """Wait until the grid shows these images."""
    wait_for(lambda: alike(in_grid(page), images), "the grid never showed these images")


def press(page, label, key, times=1):
    """Keys on the control of a label."""
    control = page.get_by_label(label, exact=True)
    control.focus()
    for _ in range(times):
        page.keyboard.press(key)


def direction_label(name):
    return f"Direction {name}" if name.isdigit() else name


def choose_stops(page, *places):
    """Make images of the grid stops, by keyboard."""
    for place in places:
        page.locator(".tile").nth(place).focus()
        page.keyboard.press("Enter")


def saved(page, name):
    """The file that a button downloads: its name and content."""
    with page.expect_download() as started:
        page.get_by_role("button", name=name, exact=True).click()
    return started.value.suggested_filename, started.value.path().read_bytes()


def copied(page, section, language):
    """The text that a section's button puts on the clipboard."""
    page.evaluate("navigator.clipboard.writeText('')")
    page.locator(f"#{section}").get_by_role("button", name=f"Copy as {language}").click()
    wait_for(lambda: page.evaluate("navigator.clipboard.readText()"), "nothing was copied")
    return page.evaluate("navigator.clipboard.readText()")


def run_copied(text, language, folder):
    """Run copied text as it stands, in a folder."""
    command = ["bash", "-c", text] if language == "curl" else [sys.executable, "-c", text]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)


@pytest.fixture
def upload(api, served, tmp_path):
    """An image file that the model can make: of its last class, with seed 3."""
    path = tmp_path / "mine.png"
    body = {"class": served["classes"][-1], "seed": 3, "truncation": 1.0}
    Image.open(io.BytesIO(api("generate", body).content)).save(path)  # Without its origin.
    return path


def test_first_load_shows_the_first_class(page, api, served):
    shows(page, from_api(api, first(served)))
    sides = page.eval_on_selector_all(
        ".tile img", "all => all.map(one => one.complete && one.naturalWidth)"
    )
    assert sides == [served["resolution"]] * N
    assert page.locator("#model").input_value() == served["id"]
    assert page.trouble == []


def test_a_slider_moves_by_keyboard(page, api, served):
    press(page, "Truncation", "ArrowLeft", 10)
    shows(page, from_api(api, first(served, truncation=0.5)))
    assert "truncation=0.5" in page.url
    press(page, "Truncation", "End")
    shows(page, from_api(api, first(served, truncation=None)))
    press(page, "Seed, as a slider", "ArrowRight", 2)
    shows(page, from_api(api, first(served, truncation=None, seed=2)))
    assert page.get_by_label("Seed", exact=True).input_value() == "2"


def test_classes_and_mixtures(page, api, served):
    a, b, *_ = reversed(served["classes"])
    page.get_by_label("Class", exact=True).first.select_option(a)
    shows(page, from_api(api, first(served, **{"class": a})))
    page.get_by_role("button", name="Mix in a class").click()
    page.get_by_label("Class 2", exact=True).select_option(b)
    shows(page, from_api(api, first(served, **{"class": {a: 0.5, b: 0.5}})))
    page.get_by_role("button", name="Remove class 1").click()
    shows(page, from_api(api, first(served, **{"class": b})))
    page.get_by_role("combobox", name="Images").select_option("4")
    shows(page, from_api(api, first(served, **{"class": b}, n=4)))
    assert page.trouble == []


def test_directions(page, api, served):
    name = served["directions"][1]
    press(page, direction_label(name), "ArrowRight", 8)
    shows(page, from_api(api, first(served, edits={name: 2.0})))
    page.get_by_role("button", name="Reset").click()
    shows(page, from_api(api, first(served)))


def test_the_newest_request_wins(page, api, served):
    """Images stay until newer ones are there, and an older request that ends last is too late."""
    old = from_api(api, first(served))
    shows(page, old)
    held = []
    page.route("**/v1/generate", lambda route: route.continue_() if held else held.append(route))
    with page.expect_request("**/v1/generate"):
        page.get_by_label("Seed", exact=True).fill("3")
    page.wait_for_timeout(300)
    assert alike(in_grid(page), old)
    page.get_by_label("Seed", exact=True).fill("7")
    newest = from_api(api, first(served, seed=7))
    shows(page, newest)
    with contextlib.suppress(Error):  # The page has broken it off.
        held[0].continue_()
    page.wait_for_timeout(1000)
    assert alike(in_grid(page), newest)


def test_downloads_of_the_grid(page, api, served):
    name, sheet = saved(page, "Download PNG")
    assert name == "images.png"
    assert alike(pixels(sheet), pixels(api("generate", first(served)).content))
    name, archive = saved(page, "Download ZIP")
    assert name == "images.zip"
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert sum(file.endswith(".png") for file in files.namelist()) == N


def test_interpolation_plays_and_downloads(page, served):
    choose_stops(page, 0, 5)
    page.get_by_role("button", name="Play", exact=True).click()
    player = page.get_by_alt_text("Animation through 2 stops")
    player.wait_for()
    assert player.evaluate("one => one.decode().then(() => one.naturalWidth)") >= 64
    seen = {player.screenshot() for _ in range(8) if not page.wait_for_timeout(150)}
    assert len(seen) > 1, "the animation stands still"
    for label in ("WebP", "GIF"):
        name, content = saved(page, f"Download {label}")
        assert name == f"path.{label.lower()}"
        assert Image.open(io.BytesIO(content)).n_frames > 16
    name, film = saved(page, "Download MP4")
    assert name == "path.mp4"
    assert film[4:8] == b"ftyp"
    page.get_by_role("button", name="Stop", exact=True).click()
    assert not player.is_visible()
    page.get_by_role("button", name="Remove stop 1").click()
    assert page.locator(".stops li").count() == 1
    expect(page.get_by_role("button", name="Remove stop 1")).to_be_focused()


def test_upload_is_inverted_edited_and_interpolated(page, api, served, upload):
    page.set_input_files("#file", upload)
    page.evaluate("""() => {
      window.places = new Set();
      const progress = document.getElementById("progress");
      const look = () => places.add(progress.position);
      new MutationObserver(look).observe(progress, { attributes: true });
    }""")
    page.get_by_role("button", name="Find its latent").click()
    page.get_by_role("button", name="Edit: candidate 1").wait_for(timeout=90_000)
    places = sorted(page.evaluate("[...places]"))
    assert len([place for place in places if 0 < place <= 1]) >= 2, places
    found = decode(page.get_by_alt_text("Candidate 1").get_attribute("src"))
    assert found.shape == pixels(upload.read_bytes()).shape

    page.get_by_role("button", name="Edit: candidate 1").click()
    wait_for(lambda: len(in_grid(page)) == 1, "the found latent is not shown")
    assert np.abs(in_grid(page)[0] - found).max() <= 2  # The link rounds a latent.
    press(page, direction_label(served["directions"][0]), "ArrowRight", 8)
    wait_for(lambda: len(in_grid(page)) > 1, "the way to the edit is not shown")
    assert not alike(in_grid(page)[:1], in_grid(page)[-1:])

    page.get_by_role("button", name="As stop: candidate 1").click()
    page.get_by_role("button", name="Back to seeds").click()
    shows(page, from_api(api, first(served)))
    choose_stops(page, 2)
    page.get_by_role("button", name="Play", exact=True).click()
    page.get_by_alt_text("Animation through 2 stops").wait_for()


def test_a_search_can_be_cancelled(page, upload):
    page.set_input_files("#file", upload)
    page.get_by_role("button", name="Upscale", exact=True).click()
    with page.expect_event("requestfailed", lambda request: "v1/upscale" in request.url):
        page.get_by_role("button", name="Cancel").click()
    assert page.get_by_text("cancelled").is_visible()
    assert not page.locator("#progress").is_visible()
    assert page.locator("#found li").count() == 0


def test_dropped_and_pasted_images(page, upload):
    give = """([base64, event, holder]) => {
      const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], `${event}.png`, { type: "image/png" }));
      const init = { bubbles: true, cancelable: true, [holder]: data };
      document.body.dispatchEvent(event === "drop" ? new DragEvent(event, init)
        : new ClipboardEvent(event, init));
    }"""
    content = base64.b64encode(upload.read_bytes()).decode()
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(give, [content, event, holder])
        page.get_by_text(f"{event}.png").wait_for()
        shown = page.locator("#uploaded").get_attribute("src")
        assert base64.b64decode(shown.split(",")[1]) == upload.read_bytes()


def test_origin_is_told(page, api, served, upload, tmp_path):
    told = page.locator("#upload-status")
    made = tmp_path / "made.png"
    made.write_bytes(api("generate", {"class": served["classes"][0], "seed": 1}).content)
    for path in (upload, made):
        page.set_input_files("#file", path)
        page.get_by_text(path.name).wait_for()
        page.get_by_role("button", name="Verify origin").click()
        image = base64.b64encode(path.read_bytes()).decode()
        status = api("verify", {"image": image}).json()["status"]
        wait_for(lambda status=status: told.inner_text().startswith(status), status)


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_copied_requests_run(page, api, served, upload, tmp_path, language):
    name = served["directions"][0]
    press(page, direction_label(name), "ArrowRight", 4)
    wanted = first(served, edits={name: 1.0})
    shows(page, from_api(api, wanted))
    run_copied(copied(page, "images", language), language, tmp_path)
    made = pixels((tmp_path / "images.png").read_bytes())
    assert alike(made, pixels(api("generate", wanted).content))

    choose_stops(page, 1, 2)
    run_copied(copied(page, "path", language), language, tmp_path)
    assert Image.open(tmp_path / "path.webp").n_frames > 16

    page.set_input_files("#file", upload)
    page.get_by_text(upload.name).wait_for()
    page.get_by_role("button", name="Verify origin").click()
    expect(page.locator("#upload-status")).not_to_be_empty()
    run_copied(copied(page, "upload", language), language, tmp_path)
    assert '"status"' in (tmp_path / "origin.json").read_text()


def test_an_error_is_told_in_the_servers_words(page, page_url, api, served):
    wanted = from_api(api, first(served))
    shows(page, wanted)
    page.get_by_label("Seed", exact=True).fill(str(2**53))
    body = {"class": served["classes"][0], "seed": 2**53}
    problem = requests.post(f"{page_url}/v1/generate", json=body, timeout=60).json()
    alert = page.get_by_role("alert").filter(has_text=problem["title"])
    alert.wait_for()
    assert problem["detail"] in alert.inner_text()
    assert alike(in_grid(page), wanted), "the images were lost"
    page.get_by_label("Seed", exact=True).fill("1")
    shows(page, from_api(api, first(served, seed=1)))
    assert page.locator(".problem").count() == 0


def test_a_link_gives_the_same_view(page, open_page, api, served):
    press(page, "Truncation", "ArrowLeft", 4)
    page.get_by_label("Class", exact=True).first.select_option(served["classes"][1])
    press(page, direction_label(served["directions"][0]), "ArrowLeft", 6)
    page.get_by_label("Seed", exact=True).fill("11")
    edits = {served["directions"][0]: -1.5}
    wanted = {"class": served["classes"][1], "truncation": 0.8, "seed": 11, "edits": edits}
    shows(page, from_api(api, first(served, **wanted)))
    choose_stops(page, 0, 3)
    press(page, "Frames a second", "ArrowRight", 3)
    page.get_by_label("Return to the first stop").uncheck()
    page.wait_for_url("**loop=false**")
    again = open_page(page.url.split("#")[1])
    again.locator(".tile img").first.wait_for()
    shows(again, in_grid(page))
    expect(again.locator(".stops img[src]")).to_have_count(2)
    stops = [
        np.stack([decode(image.get_attribute("src")) for image in one.locator(".stops img").all()])
        for one in (page, again)
    ]
    assert alike(*stops)
    values = """() => [...document.querySelectorAll("input, select")].map(
      (one) => one.type === "checkbox" ? one.checked : one.value)"""
    assert page.evaluate(values) == again.evaluate(values)
    assert again.url == page.url


DAMAGED = [
    *(f"{name}=null" for name in ("classes", "seed", "n", "edits", "stops", "fps", "loop")),
    *("classes=[null]", "classes=[[3,1]]", 'classes=[["digit 0"]]', 'classes=[["digit 0","x"]]'),
    *("stops=[null]", "stops=[3]", 'stops={"0":1}', "image=3", "image=[]", 'edits={"0":"x"}'),
    *("n={}", "seed=1e999", 'truncation="x"', "toString=1", "__proto__=null", "%=%&&=", "null"),
]


@pytest.mark.parametrize("fragment", DAMAGED)
def test_a_damaged_link_gives_what_it_can(open_page, api, served, fragment):
    page = open_page(f"frames=20&{fragment}")
    page.locator(".tile img").first.wait_for()
    shows(page, from_api(api, first(served)))
    assert page.get_by_label("Frames between stops").input_value() == "20"
    assert page.trouble == []


@pytest.mark.parametrize(
    "fragment",
    [
        *("n=-1", "image={}", "stops=[{}]", 'classes=[["x",-1]]', 'classes=[["",0]]', "model="),
        *("frames=1e308", 'stops=[{"seed":1},{"y":[0]}]', 'edits={"x":1}', "truncation=-5"),
    ],
)
def test_from_what_the_endpoint_refuses_another_link_leads_on(open_page, api, served, fragment):
    page = open_page(fragment)
    page.wait_for_timeout(500)
    page.evaluate("location.hash = 'seed=2'")
    page.locator(".tile img").first.wait_for()
    shows(page, from_api(api, first(served, seed=2)))
    assert [one for one in page.trouble if "Failed to load resource" not in one] == []


def test_the_description_needs_no_other_machine(page, page_url):
    page.goto(f"{page_url}/docs")
    operations = page.locator(".opblock")
    operations.first.wait_for()
    document = requests.get(f"{page_url}/openapi.json", timeout=60).json()
    assert operations.count() == sum(map(len, document["paths"].values()))
    generate = operations.filter(has_text="/v1/generate")
    generate.click()
    generate.get_by_role("button", name="Try it out").click()
    generate.get_by_role("button", name="Execute").click()
    picture = generate.locator("img")
    picture.wait_for()
    assert picture.evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
    assert page.trouble == []


def test_every_control_is_reached_by_tab_and_named(page, upload):
    choose_stops(page, 0, 1)
    page.get_by_role("button", name="Mix in a class").click()
    page.set_input_files("#file", upload)
    page.get_by_text(upload.name).wait_for()
    page.wait_for_timeout(500)
    wanted = page.evaluate("""() => {
      const controls = "a[href], button, input, select, textarea";
      const all = [...document.querySelectorAll(controls)].filter(
        (one) => !one.disabled && one.checkVisibility());
      all.forEach((one, i) => (one.dataset.place = i));
      document.activeElement.blur();
      return all.length;
    }""")
    reached, unseen = set(), []
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        place, outlined, text = page.evaluate("""() => {
          const one = document.activeElement;
          const drawn = one.type === "file" ? one.closest("label") : one;
          const { outlineStyle, outlineWidth } = getComputedStyle(drawn);
          const outlined = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
          return [one.dataset.place, outlined, one.outerHTML.slice(0, 80)];
        }""")
        if place is not None:
            reached.add(int(place))
            unseen += [] if outlined else [text]
    assert reached == set(range(wanted))
    assert unseen == [], "focus cannot be seen"

    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "combobox", "spinbutton", "checkbox", "link", "textbox", "image"}
    nodes = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
    assert len(nodes) >= wanted
    nameless = [n for n in nodes if not n.get("name", {}).get("value")]
    assert nameless == []


LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True},
    "dark phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_looks(open_page, upload, tmp_path, look):
    page = open_page(**LOOKS[look])
    page.locator(".tile img").first.wait_for()
    choose_stops(page, 0, 3, 5)
    page.get_by_role("button", name="Mix in a class").click()
    page.get_by_role("button", name="Play", exact=True).click()
    page.get_by_alt_text("Animation through 3 stops").wait_for()
    page.set_input_files("#file", upload)
    page.get_by_label("Time").select_option("10 s")
    page.get_by_role("button", name="Upscale", exact=True).click()
    page.get_by_role("button", name="Edit: candidate 1").wait_for(timeout=90_000)
    page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    outside = page.evaluate("""() => [...document.querySelectorAll("main *")].filter((one) =>
      one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 1).length""")
    assert outside == 0
    for text, ground in (("body", "body"), (".quiet", "section"), ("button.main", "button.main")):
        assert contrast(page, text, ground) >= 4.5, text
    light = luminance(colour(page, "body", "backgroundColor"))
    assert light < 0.1 if "dark" in look else light > 0.8
    assert page.trouble == []


def colour(page, selector, kind):
    """A computed colour, red, green and blue in [0, 1]."""
    text = page.eval_on_selector(selector, f"one => getComputedStyle(one).{kind}")
    return [int(part) / 255 for part in text.strip("rgb()").split(",")]


def luminance(rgb):
    """Relative luminance, as WCAG 2 has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(page, text, ground):
    """WCAG 2's contrast of a text's colour on a ground's."""
    lights = [
        luminance(colour(page, text, "color")),
        luminance(colour(page, ground, "backgroundColor")),
    ]
    return (max(lights) + 0.05) / (min(lights) + 0.05)
