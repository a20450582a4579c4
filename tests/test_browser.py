"""The report in a real browser: Chromium without a window, by Selenium."""

import base64
import json
import shutil

import pages
import pytest

from prefix_distill.config import EvaluationSpec

webdriver = pytest.importorskip(
    "selenium.webdriver",
    reason="selenium is not installed: pip install -e '.[test,browser]'",
)
CHROMIUM = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
    ),
    None,
)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason=(
            "there is no chromium or no chromedriver: apt-get install chromium"
            " chromium-driver"
        ),
    ),
]
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  profile = tmp_path_factory.mktemp("profile")
  for flag in (*_FLAGS, f"--user-data-dir={profile}"):
    options.add_argument(flag)
  options.set_capability(
      "goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"}
  )
  service = webdriver.ChromeService(DRIVER)
  driver = webdriver.Chrome(options=options, service=service)
  driver.set_page_load_timeout(120)
  yield driver
  driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "one"
  pages.write(pages.RUN, workdir, pages.ROLLOUTS, pages.ANSWERS)
  return workdir


@pytest.fixture
def opened(browser, folder, request):
  """Opens the page anew, 1200 or so many pixels wide, in light or dark."""
  width, scheme = getattr(request, "param", (1200, "light"))
  browser.get("about:blank")
  for kind in ("performance", "browser"):
    browser.get_log(kind)
  browser.execute_cdp_cmd(
      "Emulation.setDeviceMetricsOverride",
      {
          "width": width,
          "height": 900,
          "deviceScaleFactor": 1,
          "mobile": width < 600,
      },
  )
  browser.execute_cdp_cmd(
      "Emulation.setEmulatedMedia",
      {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
  )
  browser.get((folder / "report" / "report.html").as_uri())
  return browser


def js(driver, code: str, *args):
  return driver.execute_script(f"return {code}", *args)


def texts(driver, selector: str) -> list[str]:
  """Returns the text of the elements that are shown."""
  return js(
      driver,
      "[...document.querySelectorAll(arguments[0])]"
      ".filter(x => x.getClientRects().length).map(x => x.textContent)",
      selector,
  )


def click(driver, selector: str) -> None:
  driver.find_element("css selector", selector).click()


def choose(driver, select: str, value: str) -> None:
  click(driver, f"{select} option[value='{value}']")


def assert_clean(driver) -> None:
  """Nothing was asked of the network, and nothing complained."""
  asked = []
  for entry in driver.get_log("performance"):
    message = json.loads(entry["message"])["message"]
    if message["method"] == "Network.requestWillBeSent":
      asked.append(message["params"]["request"]["url"])
  others = [x for x in asked if not x.startswith(("data:", "about:"))]
  assert len(others) == 1 and others[0].endswith("/report/report.html"), others
  assert driver.get_log("browser") == []
  assert driver.title == "one – prefix_distill"


def test_rollouts_are_filtered_and_chosen(opened):
  assert len(texts(opened, ".rollout")) == 2
  assert texts(opened, "#rollouts-shown") == ["2 of 2 rollouts"]
  # Records are counted from 1, as errors and preflight do.
  assert texts(opened, ".rollout .head strong + span") == [
      "record 4",
      "record 5",
  ]
  click(opened, "#after")
  assert texts(opened, ".rollout .head strong") == ["update 2"] * 2
  assert texts(opened, ".rollout .head .finished") == ["finished"]
  click(opened, "[data-filter=rollouts] [value=cut]")
  assert texts(opened, "#rollouts-shown") == ["1 of 2 rollouts"]
  assert texts(opened, ".rollout .head .cut") == []
  click(opened, "[data-filter=rollouts] [value=finished]")
  assert texts(opened, ".rollout") == []
  click(opened, "[data-filter=rollouts] [value=cut]")
  choose(opened, "#update", "1")
  assert texts(opened, ".rollout .head .cut") == ["cut"] * 2
  assert not js(opened, "document.getElementById('before').disabled === false")
  assert_clean(opened)


def test_a_token_shows_what_the_models_thought_of_it(opened):
  tokens = opened.find_elements("css selector", ".rollout .token")
  assert [x.text for x in tokens[:2]] == ["We", " want↵"]
  webdriver.ActionChains(opened).move_to_element(tokens[0]).perform()
  (tip,) = texts(opened, "#tip")
  assert "position 0, KL < 0.001 nats" in tip
  assert "student 25.0 %, teacher 75.0 %" in tip
  assert f"␣guess0{pages.EVIL.replace(' ', '␣')}12.5 %" in tip
  # By the keyboard alone.
  tokens[0].send_keys(webdriver.Keys.ARROW_RIGHT)
  assert "position 1, KL 0.500 nats" in texts(opened, "#tip")[0]
  opened.switch_to.active_element.send_keys(webdriver.Keys.END)
  assert "<|im_end|>" in texts(opened, "#tip")[0]
  assert js(opened, "document.activeElement.classList.contains('special')")
  opened.switch_to.active_element.send_keys(webdriver.Keys.ESCAPE)
  assert texts(opened, "#tip") == []
  # By a touch, and what was not finite.
  tokens[3].click()
  assert "not finite" in texts(opened, "#tip")[0]
  click(opened, "h1")
  assert texts(opened, "#tip") == []
  assert_clean(opened)


def test_redder_is_further_from_the_teacher(opened):
  heat = js(
      opened,
      "[...document.querySelectorAll('.rollout .token')].slice(0, 5).map("
      "x => Number((getComputedStyle(x).backgroundColor.match("
      "/[\\d.]+(?=\\)$)/) || [0])[0]))",
  )
  # 2 nats and more are as red as can be, and a sixteenth of them half as red.
  assert heat[0] == 0 and heat[1] == pytest.approx(0.5, abs=0.01)
  assert heat[4] < 0.01


def test_answers_stand_side_by_side_and_are_filtered(opened):
  first = ".problem:first-child .answer .head strong"
  assert texts(opened, first) == [
      "before training",
      "after (update 2)",
      "teacher",
  ]
  assert texts(opened, "#answers-shown") == ["6 of 6 answers"]
  assert texts(opened, ".problem h3") == ["Problem 1", "Problem 6"]
  tops = js(
      opened,
      "[...document.querySelectorAll('.problem:first-child .answer')]"
      ".map(x => x.getBoundingClientRect().top)",
  )
  assert len(set(tops)) == 1
  click(opened, "[data-filter=answers] [value=right]")
  assert texts(opened, "#answers-shown") == ["2 of 6 answers"]
  assert texts(opened, ".answer .head .right") == []
  click(opened, "[data-filter=answers] [value=cut]")
  assert texts(opened, ".answer .head strong") == ["before training"]
  assert len(texts(opened, ".problem")) == 1
  click(opened, "[data-filter=answers] [value=right]")
  choose(opened, "#set", '["heldout","greedy"]')
  assert texts(opened, "#answers-shown") == ["1 of 1 answer"]
  assert_clean(opened)


@pytest.mark.parametrize(
    "sets, words",
    [({}, "The run has no evaluation set"), (None, "The run kept no answers")],
)
def test_a_section_without_samples_says_why(browser, tmp_path, sets, words):
  changes = {} if sets is None else {"evaluation": EvaluationSpec(sets)}
  pages.write(pages.RUN[2:4], tmp_path, **changes)
  browser.get((tmp_path / "report" / "report.html").as_uri())
  assert any(x.startswith(words) for x in texts(browser, "#answers p"))
  assert any("kept no rollouts" in x for x in texts(browser, "#rollouts p"))
  assert texts(browser, ".bar") == []
  assert browser.get_log("browser") == []


def test_what_a_model_wrote_is_text_and_nothing_else(opened):
  assert js(opened, "document.querySelectorAll('script').length") == 2
  assert js(opened, "document.querySelectorAll('main img').length") == 4
  assert any(pages.EVIL in text for text in texts(opened, ".answer"))
  assert any(pages.EVIL in text for text in texts(opened, ".rollout .prompt"))
  assert "me/<b>student</b>" in texts(opened, "dd")
  # Nor would it run if it were HTML: only the page's own script may.
  opened.execute_script(
      "const s = document.createElement('script');"
      "s.textContent = \"document.title = 'owned'\"; document.body.append(s);"
  )
  assert opened.title == "one – prefix_distill"


@pytest.mark.parametrize(
    "opened", [(1200, "dark"), (1200, "light"), (400, "light"), (400, "dark")],
    indirect=True,
)
def test_it_is_readable_everywhere(opened):
  wide, inner = js(
      opened, "[document.documentElement.scrollWidth, window.innerWidth]"
  )
  assert wide <= inner
  contrast = js(
      opened,
      """(() => {
        const light = (color) => {
          const [r, g, b] = color.match(/[\\d.]+/g).map(x => x / 255)
            .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
          return .2126 * r + .7152 * g + .0722 * b;
        };
        const page = light(getComputedStyle(document.body).backgroundColor);
        return ['body', '.spent', 'nav a', '.wrong', '.right', '.cut']
          .map(x => light(getComputedStyle(document.querySelector(x)).color))
          .map(x => (Math.max(x, page) + .05) / (Math.min(x, page) + .05));
      })()""",
  )
  assert min(contrast) > 4.5  # Level AA of WCAG 2.
  # The tip is on the screen.
  token = opened.find_element("css selector", ".rollout .token")
  token.click()
  left, top, right, bottom, width, height = js(
      opened,
      "(r => [r.left, r.top, r.right, r.bottom, innerWidth, innerHeight])("
      "document.getElementById('tip').getBoundingClientRect())",
  )
  assert 0 <= left < right <= width and 0 <= top < bottom <= height
  assert_clean(opened)
  # All figures are there.
  widths = js(
      opened, "[...document.querySelectorAll('img')].map(x => x.naturalWidth)"
  )
  assert len(widths) == 4 and min(widths) > 100
  shot = base64.b64decode(opened.get_screenshot_as_base64())
  assert len(shot) > 5000
