"""The web chat in a real browser: headless Chromium, driven by selenium."""

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("nicegui", reason="the extra `web` is not installed")
webdriver = pytest.importorskip("selenium.webdriver")
httpx = pytest.importorskip("httpx2", reason="the openai package brings it")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("there is no Chromium: apt-get install chromium chromium-driver", allow_module_level=True)

from running import Server  # noqa: E402
from selenium.common import exceptions  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

ANSWER = "Ones: 1 + 4 = 5. Tens: 2 + 3 = 5. So 21 + 34 = 55."
# Records every text that the first answer has had, however briefly.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const answer = document.querySelectorAll(".turn .content")[1];
  if (answer) window.seen.push(answer.innerText.trim());
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage"


@pytest.fixture(scope="module")
def server():
    with Server("--max_seq_len", "2048", "--model_name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = shutil.which("chromium")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """The chat as a user sees and uses it."""

    def __init__(self, browser, server: Server):
        self.browser, self.url = browser, server.url
        browser.get(server.url)
        self.wait(lambda: self.button("Send").is_displayed())

    def wait(self, condition) -> None:
        not_yet = (
            *(exceptions.NoSuchElementException, exceptions.StaleElementReferenceException, IndexError),
            exceptions.ElementNotInteractableException,
        )
        WebDriverWait(self.browser, 120, 0.02, not_yet).until(lambda _: condition())

    def button(self, label: str):
        return self.browser.find_elements(By.CSS_SELECTOR, f'[aria-label="{label}"]')[-1]

    def press(self, label: str) -> None:
        """Clicks a button as soon as it can be clicked, however often the page is redrawn meanwhile."""
        self.wait(lambda: self.button(label).click() is None)

    def texts(self) -> list[str]:
        found = self.browser.find_elements(By.CSS_SELECTOR, ".turn .content")
        return [element.text for element in found]

    def stale(self) -> list:
        """The turns that the edited message will replace."""
        return self.browser.find_elements(By.CSS_SELECTOR, ".turn.stale")

    def set(self, label: str, text: str) -> None:
        """Changes a setting, and sees after a reload that the server has it."""

        def is_kept() -> bool:
            self.browser.refresh()
            self.wait(lambda: self.button("Settings").is_displayed())
            if self.setting(label).get_attribute("value") == text:
                return True
            self.press("Settings")
            self.wait(lambda: self.setting(label).is_displayed())
            self.setting(label).send_keys(Keys.CONTROL, "a")
            self.setting(label).send_keys(text, Keys.TAB)
            return False

        self.wait(is_kept)

    def setting(self, label: str):
        return self.browser.find_element(By.CSS_SELECTOR, f'[aria-label^="{label}"]')

    def ask(self, text: str) -> None:
        self.button("Message").send_keys(text, Keys.ENTER)


@pytest.fixture
def page(browser, server) -> Page:
    browser.switch_to.new_window("tab")  # which has its own conversation
    page = Page(browser, server)
    page.set("Temperature", "0")
    return page


def test_an_answer_streams_survives_a_reload_and_can_be_edited_and_regenerated(page, demo):
    page.browser.execute_script(WATCH)
    page.ask("What is 21 + 34?")
    page.wait(lambda: page.texts()[1] == ANSWER and page.button("Send").is_displayed())
    seen = page.browser.execute_script("return window.seen")
    assert any(text and ANSWER.startswith(text) and text != ANSWER for text in seen), seen  # it grew visibly
    assert "tokens/s" in page.browser.find_element(By.CLASS_NAME, "note").text
    assert "tiny" in page.browser.find_element(By.CLASS_NAME, "model-name").text
    for name, image in screenshots(page).items():
        if folder := os.environ.get("LLAMA_SCREENSHOTS"):  # as docs/chat.png was made
            (Path(folder) / f"chat-{name}.png").write_bytes(image)
    page.browser.refresh()
    page.wait(lambda: page.texts() == ["What is 21 + 34?", ANSWER])
    page.browser.execute_script(WATCH)
    page.press("Regenerate")
    page.wait(lambda: page.browser.execute_script("return window.seen.some(text => text != arguments[0])", ANSWER))
    page.wait(lambda: page.texts() == ["What is 21 + 34?", ANSWER] and page.button("Send").is_displayed())
    typed = lambda: page.button("Message").get_attribute("value")  # noqa: E731
    page.press("Edit")
    page.wait(lambda: len(page.stale()) == 2 and typed() == "What is 21 + 34?")
    page.button("Message").send_keys(Keys.ESCAPE)  # nothing is lost
    page.wait(lambda: page.stale() == [] and typed() == "" and len(page.texts()) == 2)
    page.press("Edit")
    page.wait(lambda: len(page.stale()) == 2 and typed() == "What is 21 + 34?")
    page.button("Message").send_keys(Keys.CONTROL, "a")
    page.ask("What is 12 + 7?")
    (expected,) = demo.chat_completion([[{"role": "user", "content": "What is 12 + 7?"}]], temperature=0)
    page.wait(lambda: page.texts()[1:] == [expected["generation"]["content"]])
    page.wait(lambda: page.button("New chat").is_enabled())
    page.press("New chat")
    page.wait(lambda: page.texts() == [])
    is_dark = lambda: "body--dark" in page.browser.find_element(By.TAG_NAME, "body").get_attribute("class")  # noqa: E731
    before = is_dark()
    page.press("Dark or light")
    page.wait(lambda: is_dark() != before)
    page.browser.refresh()
    page.wait(lambda: page.button("Send").is_displayed() and is_dark() != before)
    assert_no_other_host(page)


def test_a_long_answer_is_stopped_and_its_slot_is_free(page, server, demo):
    dialog = [{"role": "user", "content": "Tell me a story."}]
    given = {"temperature": 5.0, "top_p": 0.9, "max_gen_len": 250}
    lengths = (
        len(demo.answer([demo.formatter.encode_dialog_prompt(dialog)], **given, seed=s)[0][0].tokens) for s in range(99)
    )
    seed = next(seed for seed, length in enumerate(lengths) if length == 250)
    page.set("Temperature", "5")
    page.set("Seed", str(seed))
    page.ask("Tell me a story.")
    page.wait(lambda: len(page.texts()) == 2 and page.texts()[1] not in ("", "…"))
    page.press("Stop")
    page.wait(lambda: "stopped" in page.browser.find_element(By.CLASS_NAME, "note").text)
    page.wait(lambda: "llama_running 0.0" in httpx.get(server.url + "/metrics").text)
    page.press("Regenerate")
    page.wait(lambda: page.button("Stop").is_displayed() and page.texts()[1] not in ("", "…"))
    page.press("New chat")  # the running answer must not appear in it
    page.wait(lambda: page.button("Send").is_displayed())
    assert page.texts() == []


def test_markdown_cannot_run_scripts_load_from_elsewhere_or_widen_the_page(page):
    found = httpx.get(page.url).headers["content-security-policy"]
    assert "default-src 'self'" in found and "http:" not in found and "*" not in found
    wide = ("```", Keys.SHIFT + Keys.ENTER + Keys.NULL, "x " * 150, Keys.SHIFT + Keys.ENTER + Keys.NULL, "```")
    page.button("Message").send_keys(*wide, Keys.SHIFT + Keys.ENTER + Keys.NULL)
    page.ask('<img src="http://192.0.2.1/x.png" onerror="document.title=1"> ![](http://192.0.2.1/y.png)')
    page.wait(lambda: len(page.texts()) == 2 and page.button("Send").is_displayed())
    assert page.browser.title == "tiny"
    assert page.browser.find_elements(By.CSS_SELECTOR, ".turn.user pre")
    screenshots(page)
    assert_no_other_host(page, blocked="192.0.2.1")


def assert_no_other_host(page: Page, blocked: str | None = None) -> None:
    """All requests have gone to the server; requests that the policy blocked do not count."""
    import json

    sent, failed = {}, set()
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            sent[message["params"]["requestId"]] = message["params"]["request"]["url"]
        elif message["method"] == "Network.loadingFailed" and message["params"].get("blockedReason") == "csp":
            failed.add(message["params"]["requestId"])
    gone = [url for key, url in sent.items() if key not in failed]
    assert len(gone) > 5
    assert all(url.startswith((page.url, "data:", "blob:", "chrome")) for url in gone), gone
    assert blocked is None or not any(blocked in url for url in gone)


def screenshots(page: Page) -> dict[str, bytes]:
    """The page is not wider than the window, at desktop and phone width."""
    images = {}
    for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844)):
        page.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"},
        )
        wide = page.browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"the page is wider than a {name}"
        images[name] = page.browser.get_screenshot_as_png()
        assert images[name].startswith(b"\x89PNG") and len(images[name]) > 5000
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return images
