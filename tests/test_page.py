"""The page in a headless Chromium, against a scripted server: what people do with it in a day."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from page_server import HOSTILE, KEY, MARKDOWN, SCRIPTS, PageServer, rounds_of

NAMES = ("chromium", "chromium-browser", "google-chrome")
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = next(filter(None, map(shutil.which, [*NAMES, ON_A_MAC])), None)

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 720}
NOT_HAPPENING = 5_000  # milliseconds after which what should come has not
REFUSED = "Failed to load resource"  # what a browser says of each answer that is not 200


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or install Google Chrome")
    # A container's root has no sandbox; the pages are our own.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def server():
    server = PageServer().start()
    yield server
    server.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page in a fresh browser profile; whatever it complains of fails the test."""
    contexts, complaints = [], []

    def open_page(viewport=DESKTOP, script=None, context=None, **options):
        if context is None:
            context = browser.new_context(viewport=viewport, **options)
            context.set_default_timeout(NOT_HAPPENING)
            contexts.append(context)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.on("request", lambda request: complaints.extend(outside(request.url)))
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("tiny-model")
        return page

    def outside(url):
        return [] if url.startswith((server.url, "blob:")) else [f"asked for {url}"]

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if REFUSED not in text] == []


def send(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def ask(page, text):
    """Ask, and wait for the end of the answer."""
    send(page, text)
    expect(page.locator("#stop")).to_be_hidden()
    return page.locator("article.answer").last


def words(locator) -> str:
    return locator.locator(".text").evaluate("node => node.textContent")


def until(page, condition):
    """Wait for something that no locator sees; Playwright's own way needs eval: forbidden."""
    for _ in range(NOT_HAPPENING // 50):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"did not happen: {condition}")


def dangling(page) -> int:
    """Pixels that the page can be scrolled sideways."""
    return page.evaluate(
        "() => Math.max(...[document.documentElement, document.querySelector('#scroller')]"
        ".map((node) => node.scrollWidth - node.clientWidth))"
    )


# ---------------------------------------------------------------------------------------------
# Answers, and who wrote them


def test_an_answer_comes_shaded_by_who_wrote_it(visit, server):
    page = visit()
    answer = ask(page, "plain words, please")
    pieces = [piece for some in rounds_of(SCRIPTS["plain"]) for piece in some]
    drafted = [text.strip() for text, was_drafted in pieces if was_drafted]
    assert words(answer) == SCRIPTS["plain"]
    shaded = answer.locator(".drafted").all_text_contents()
    assert [text.strip() for text in shaded] == drafted
    counts = f"{len(drafted)} of {len(pieces)} tokens were guessed and kept"
    expect(page.locator(".written")).to_contain_text(counts)
    line = "12 tokens · 41.6 tokens/s · 2.0 a round · 1.8× plain"
    expect(answer.locator(".speed")).to_have_text(line)
    expect(page.locator(".gain")).to_contain_text("1.8×")
    body = server.requests[-1]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["model"] == "tiny-model"
    assert body["redrafter"] == {"details": True, "drafter": "default"}
    assert body["messages"] == [{"role": "user", "content": "plain words, please"}]


def test_shading_can_be_turned_off_and_stays_off(visit):
    page = visit()
    shaded = ask(page, "plain").locator(".drafted").first
    color = "node => getComputedStyle(node).backgroundColor"
    assert shaded.evaluate(color) != "rgba(0, 0, 0, 0)"
    page.keyboard.press("Alt+m")
    assert shaded.evaluate(color) == "rgba(0, 0, 0, 0)"
    page.reload()
    assert page.locator(".drafted").last.evaluate(color) == "rgba(0, 0, 0, 0)"


def test_the_tree_shows_the_round_and_says_what_is_seen(visit):
    page = visit()
    ask(page, "plain")
    rounds = rounds_of(SCRIPTS["plain"])
    tree = page.locator("#panel svg.tree")
    page.locator("input[type=range]").evaluate(
        "node => { node.value = 1; node.dispatchEvent(new Event('input')); }"
    )
    expect(page.locator("#panel")).to_contain_text(f"Round 1 of {len(rounds)}")
    expect(tree.locator(".node.accepted")).to_have_count(2)
    expect(tree.locator(".node.rejected")).to_have_count(5)
    expect(tree.locator(".node.next")).to_have_count(1)
    expect(page.locator("#panel .caption")).to_have_text(
        "The drafter guessed 7 tokens; one pass of the model checked them. 2 are just what the "
        "model says, and it added one of its own: 3 tokens for one pass."
    )
    tree.locator(".node.next").hover()
    expect(page.locator("#panel output")).to_have_text("?" + "".join(t for t, _ in rounds[0]))


def test_trees_of_all_shapes_are_drawn_without_overlaps(visit):
    """Random trees, deep and wide: inside the width, and no box on another."""
    page = visit()
    faults = page.evaluate(
        """async () => {
          const { layOut } = await import("/page/tree.js");
          let seed = 1;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          const faults = [];
          for (let turn = 0; turn < 300; turn += 1) {
            const size = 1 + random(40);
            const reach = 1 + random(4); // 1: a single path
            const parents = [-1];
            while (parents.length < size) {
              parents.push(Math.max(parents.length - 1 - random(reach), 0));
            }
            const tokens = parents.map(() => "token".repeat(3).slice(0, random(14)));
            const accepted = [0];
            for (let row = 1; row < size && random(4); row += 1) {
              if (parents[row] === accepted.at(-1)) accepted.push(row);
            }
            const nodes = layOut({ tree: { tokens, parents, accepted }, next: " own" }, 280);
            const right = Math.max(...nodes.map((node) => node.x + node.width));
            const overlap = nodes.some((one, row) => nodes.slice(row + 1).some((other) =>
              one.line === other.line && one.x < other.x + other.width
                && other.x < one.x + one.width));
            if (overlap || right > 280 || nodes.length !== size + 1) faults.push(parents);
          }
          return faults;
        }"""
    )
    assert faults == []


def test_markdown_becomes_what_it_means(visit):
    page = visit()
    answer = ask(page, "markdown")
    expect(answer.locator("h4")).to_have_text("Why the sky is blue")
    expect(answer.locator("strong")).to_have_text("every colour")
    expect(answer.locator("em")).to_have_text("far more")
    expect(answer.locator(".text > ol > li")).to_have_count(3)
    expect(answer.locator("ol ul > li")).to_have_count(2)
    expect(answer.locator("td.right")).to_have_text(["450 nm", "700 nm"])
    expect(answer.locator("p code, li code")).to_have_text("blue")
    expect(answer.locator("blockquote")).to_contain_text("daily bread")
    link = answer.locator("a")
    assert link.get_attribute("href") == "https://en.wikipedia.org/wiki/Rayleigh_scattering"
    assert "noopener" in link.get_attribute("rel")
    code = answer.locator("pre code").evaluate("node => node.textContent")
    assert code == "def scattering(wavelength):\n    return wavelength ** -4  # Rayleigh\n"


def test_what_a_model_says_is_never_run(visit):
    page = visit()
    answer = ask(page, "hostile")
    assert page.evaluate("window.hacked") is None
    foreign = "img, script, iframe, svg:not(.icon), [onerror], [onload], [onmouseover]"
    expect(answer.locator(".text").locator(foreign)).to_have_count(0)
    links = answer.locator(".text a").evaluate_all("nodes => nodes.map((node) => node.href)")
    quoted = "https://example.org/%22onmouseover=%22window.hacked=5"  # quotes end nothing here
    assert links == [quoted, "https://example.org/good", "https://example.org/bare"]
    said = words(answer)
    assert '<img src=x onerror="window.hacked=1">' in said
    assert "[click](javascript:window.hacked=3)" in said
    assert "<b>not bold</b>" in said


def test_a_text_that_grows_ends_as_if_it_had_come_at_once(visit):
    """For every document: fed token by token and character by character, the same nodes."""
    page = visit()
    documents = [
        MARKDOWN,
        HOSTILE,
        SCRIPTS["think"],
        "```py\na = `1`\n``\n```` \n```\nafter\n\n```\nopen ``",
        "> quote\n> - item\n>   ```\n>   code\n>   ```\nlazy\n\n***both*** **open _and_ `code",
        "1. a\n\n   b\n2. c\n- d\n  * e\n\n    f\n10. g\n\nx | y\n--|--\n1 | 2\n",
        "****\n- - -\n# h #\npara\n**bold**\n- \n#\n1986. no list\na | b\n",
        "snake_case_name 2 * 3 * 4 \\*not\\* __b__ ~~d~~",
        "<https://a.example/x_y_z> https://a.example/(b). a<br>b ![i](https://a.example/i)",
        "*" * 3000 + "[" * 3000 + "`" * 301 + " a" + ">" * 500,
    ]
    differing = page.evaluate(
        """async (documents) => {
          const { MarkdownView } = await import("/page/markdown.js");
          const { Shades } = await import("/page/shades.js");
          const show = (text, steps) => {
            const root = document.createElement("div");
            const view = new MarkdownView(root, new Shades());
            for (const to of steps) view.update(text.slice(0, to), true);
            view.update(text, false);
            root.normalize();
            return root.innerHTML;
          };
          return documents.filter((text) => {
            const whole = show(text, []);
            const size = Math.ceil(text.length / 150);
            const letters = [...Array(Math.ceil(text.length / size)).keys()].map((n) => n * size);
            const tokens = [...text.matchAll(/\\s*\\S+/g)].map((found) => found.index);
            return [letters, tokens].some((steps) => show(text, steps) !== whole);
          });
        }""",
        documents,
    )
    assert differing == []


def test_a_long_answer_is_not_made_anew(visit):
    page = visit()
    send(page, "forever")
    paragraphs = page.locator("article.answer .text p")
    expect(paragraphs.nth(2)).to_be_attached()
    first = paragraphs.first.element_handle()
    expect(paragraphs.nth(9)).to_be_attached()
    page.click("#stop")
    assert first.evaluate("node => node.isConnected")
    said = [text.strip() for text in SCRIPTS["forever"].split("\n\n")]
    assert paragraphs.all_text_contents()[:9] == said[:9]


@pytest.mark.parametrize("chunks", ["think", "apart"])
def test_reasoning_is_folded_apart_from_the_answer(visit, server, chunks):
    page = visit()
    answer = ask(page, chunks)
    assert words(answer) == "It is four."
    rounds = rounds_of(SCRIPTS[chunks])
    drafted = sum(was_drafted for some in rounds for _, was_drafted in some)
    written = f"{drafted} of {sum(map(len, rounds))} tokens were guessed and kept"
    expect(page.locator(".written")).to_contain_text(written)
    reasoning = answer.locator("details")
    expect(reasoning).to_have_js_property("open", False)
    assert "Let me see." in reasoning.text_content()
    reasoning.locator("summary").click()
    expect(reasoning.get_by_text("Let me see.")).to_be_visible()
    ask(page, "plain")
    said = {"role": "assistant", "content": "\n\nIt is **four**."}
    assert server.requests[-1]["messages"][1] == said


def test_progress_is_shown_while_a_prompt_is_read(visit, server):
    page = visit()
    server.reading = True
    send(page, "prompt")
    reading = page.locator(".progress")
    expect(reading).to_contain_text(re.compile(r"Reading the conversation: [\d,]+ of 2,048 tokens"))
    expect(reading).to_contain_text("256 known from before")
    server.reading = False
    expect(page.locator("#stop")).to_be_hidden()
    expect(reading).to_be_empty()


# ---------------------------------------------------------------------------------------------
# Stopping, errors, keys


@pytest.mark.parametrize("how", ["button", "key"])
def test_stopping_ends_the_answer_and_keeps_its_text(visit, server, how):
    page = visit()
    send(page, "endless")
    answer = page.locator("article.answer")
    expect(answer).to_contain_text("three")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(answer).to_contain_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    page.wait_for_timeout(300)
    assert server.left == 1
    text = words(answer)
    assert text.startswith("one two three")
    page.wait_for_timeout(100)
    assert words(answer) == text
    ask(page, "plain")
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_errors_are_shown_in_their_place_and_can_be_tried_again(visit, server):
    page = visit()
    answer = ask(page, "refuse this")
    expect(answer.locator(".error")).to_have_text("the prompt has 9000 tokens: too long")
    answer = ask(page, "fail in the middle")
    expect(answer.locator(".error")).to_have_text("the engine failed: out of memory")
    assert words(answer).startswith("one two three")
    # A question that got no answer joins the next one, as templates want turns.
    assert server.requests[-1]["messages"][0]["content"] == "refuse this\n\nfail in the middle"
    answer = ask(page, "drop the line")
    expect(answer.locator(".error")).to_contain_text("ended before the answer was complete")
    before = len(server.requests)
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator("#stop")).to_be_hidden()
    assert len(server.requests) == before + 1


def test_a_server_that_is_gone_is_said(visit, server):
    page = visit()
    server.close()
    answer = ask(page, "plain")
    expect(answer.locator(".error")).to_contain_text("cannot be reached")


def test_a_full_queue_is_waited_for(visit, server):
    server.busy = True
    page = visit()
    send(page, "plain")
    expect(page.locator(".progress")).to_contain_text("The server is busy. Trying again in")
    server.busy = False
    expect(page.locator("article.answer")).to_contain_text("twelve")
    assert len(server.requests) > 1


def test_a_key_is_asked_for_once(visit, server, browser):
    server.key = KEY
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(NOT_HAPPENING)
    page = context.new_page()
    page.goto(server.url)
    for key in ("wrong", KEY):
        expect(page.locator("#key")).to_be_visible()
        page.fill("#key input", key)
        page.press("#key input", "Enter")
    expect(page.locator("#model")).to_have_text("tiny-model")
    expect(page.locator("#key")).to_be_hidden()
    assert words(ask(page, "plain")) == SCRIPTS["plain"]
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny-model")
    assert page.evaluate("Object.values(localStorage).join().includes('open-sesame')") is False
    context.close()


# ---------------------------------------------------------------------------------------------
# Conversations


def test_a_reload_keeps_everything(visit):
    page = visit()
    ask(page, "markdown, please")
    ask(page, "plain")
    page.fill("#question", "not sent yet")
    before = page.locator("#log").evaluate("node => node.innerHTML")
    page.reload()
    expect(page.locator("#title")).to_have_text("markdown, please")
    expect(page.locator("article")).to_have_count(4)
    assert page.locator("#log").evaluate("node => node.innerHTML") == before
    expect(page.locator("#question")).to_have_value("not sent yet")
    expect(page.locator("#panel svg.tree")).to_be_visible()


def test_an_answer_that_a_reload_cut_short_can_be_asked_for_again(visit):
    page = visit()
    send(page, "endless")
    expect(page.locator("article.answer")).to_contain_text("three")
    page.reload()
    answer = page.locator("article.answer")
    expect(answer).to_contain_text("one two three")
    expect(answer.get_by_role("button", name="Try again")).to_be_visible()


def test_conversations_go_on_beside_each_other(visit, server):
    page = visit()
    send(page, "endless first")
    expect(page.locator("article.answer")).to_contain_text("three")
    page.keyboard.press("Alt+n")
    expect(page.locator("#welcome")).to_be_visible()
    assert words(ask(page, "plain second")) == SCRIPTS["plain"]
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "plain second"}]
    titles = page.locator("#conversations .open span")
    expect(titles).to_have_text(["plain second", "endless first"])
    expect(page.locator("#conversations .busy")).to_have_count(1)
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("#title")).to_have_text("endless first")
    page.keyboard.press("Escape")
    expect(page.locator("article.answer")).to_contain_text("Stopped.")


def test_a_conversation_is_renamed_deleted_and_brought_back(visit):
    page = visit()
    ask(page, "plain first")
    page.click("#new")
    ask(page, "plain second")
    row = page.locator("#conversations li", has_text="plain first")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    page.locator("#conversations input").fill("Colours")
    page.keyboard.press("Enter")
    titles = page.locator("#conversations .open span")
    expect(titles).to_have_text(["plain second", "Colours"])
    row = page.locator("#conversations li", has_text="Colours")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(titles).to_have_text(["plain second"])
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["plain second", "Colours"])
    expect(page.locator("#title")).to_have_text("Colours")
    page.reload()
    expect(page.locator("article.answer")).to_contain_text("twelve")


def test_the_last_message_can_be_edited_and_answered_again(visit, server):
    page = visit()
    ask(page, "plain one")
    ask(page, "plain two")
    page.press("#question", "ArrowUp")
    page.get_by_label("Edit the message").fill("plain three")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("article.question .bubble")).to_have_text(["plain one", "plain three"])
    contents = [message["content"] for message in server.requests[-1]["messages"]]
    assert contents == ["plain one", SCRIPTS["plain"], "plain three"]
    page.locator("article.answer").last.get_by_role("button", name="another answer").click()
    expect(page.locator("#stop")).to_be_hidden()
    assert server.requests[-1] == server.requests[-2]
    expect(page.locator("article")).to_have_count(4)


def test_two_tabs_see_each_others_conversations(visit):
    page = visit()
    ask(page, "plain first")
    other = visit(context=page.context)
    other.click("#new")
    ask(other, "plain second")
    titles = page.locator("#conversations .open span")
    expect(titles).to_have_text(["plain second", "plain first"])
    ask(page, "plain third")
    titles = other.locator("#conversations .open span")
    expect(titles).to_have_text(["plain first", "plain second"])
    row = page.locator("#conversations li", has_text="plain second")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(titles).to_have_text(["plain first"])


FULL = """
const write = Storage.prototype.setItem;
Storage.prototype.setItem = function (key, value) {
  if (key.includes("conversation")) throw new DOMException("full", "QuotaExceededError");
  return write.call(this, key, value);
};
"""


def test_a_full_browser_is_said_and_the_chat_goes_on(visit):
    page = visit(script=FULL)
    assert words(ask(page, "plain")) == SCRIPTS["plain"]
    expect(page.locator("#notice")).to_contain_text("no more room")
    page.click("#new")
    page.locator("#conversations .open").click()
    expect(page.locator("article.answer")).to_contain_text("twelve")


def test_settings_reach_the_server(visit, server):
    page = visit()
    page.keyboard.press("Alt+g")
    for name, value in {
        "system": "Be short.", "temperature": "0.7", "top_p": "0.9", "max_tokens": "100",
        "seed": "7", "budget": "8",
    }.items():  # fmt: skip
        page.fill(f"#set-{name}", value)
    page.select_option("#set-drafter", "max_gram")
    page.get_by_role("button", name="Save", exact=True).click()
    page.reload()
    ask(page, "plain")
    body = server.requests[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    sampling = {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert sampling == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 100, "seed": 7}
    assert body["redrafter"] == {"details": True, "drafter": "max_gram", "budget": 8}


def test_another_model_can_be_chosen_where_the_server_lists_others(visit, server):
    server.models = ["tiny-model", "org/a-model-with-a-name-of-some-length-8B-4bit"]
    page = visit(viewport=PHONE)
    chooser = page.get_by_label("Model to ask")
    expect(chooser).to_have_value("tiny-model")
    expect(page.locator("#model")).to_be_hidden()
    assert dangling(page) <= 0
    ask(page, "plain")
    chooser.select_option(server.models[1])
    expect(page.locator("#question")).to_be_focused()
    ask(page, "plain again")
    assert [body["model"] for body in server.requests] == server.models


def test_there_is_no_choice_of_one_model(visit):
    page = visit()
    expect(page.locator("#model")).to_be_visible()
    expect(page.locator("#models")).to_be_hidden()


# ---------------------------------------------------------------------------------------------
# Reading, keys, windows


def test_scrolling_follows_only_a_reader_at_the_end(visit):
    page = visit()
    send(page, "endless")
    scroller = page.locator("#scroller")
    until(page, "document.querySelector('#scroller').scrollTop > 20")
    left = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    assert scroller.evaluate(left) < 4
    scroller.evaluate("node => { node.scrollTop -= 15; }")
    expect(page.locator("#latest")).to_be_visible()
    place = scroller.evaluate("node => node.scrollTop")
    page.wait_for_timeout(400)
    assert scroller.evaluate("node => node.scrollTop") == place
    page.click("#latest")
    expect(page.locator("#latest")).to_be_hidden()
    assert scroller.evaluate(left) < 4


def test_keys(visit, server):
    page = visit()
    page.fill("#question", "plain")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("words")
    expect(page.locator("#question")).to_have_value("plain\nwords")
    assert server.requests == []
    page.press("#question", "Enter")
    expect(page.locator("article.question .bubble")).to_have_text("plain\nwords")
    expect(page.locator("#stop")).to_be_hidden()
    page.locator("#scroller").focus()
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()


def test_a_phone_needs_no_sideways_scrolling(visit):
    page = visit(viewport=PHONE)
    assert dangling(page) <= 0
    for script in ("markdown", "hostile", "wide"):
        ask(page, script)
        assert dangling(page) <= 0
    page.click("#open-panel")
    expect(page.locator("#panel svg.tree")).to_be_visible()
    page.locator("#panel").get_by_role("button", name="Close").click()
    expect(page.locator("#panel")).not_to_be_visible()
    page.click("#open-sidebar")
    page.click("#new")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#sidebar")).not_to_be_visible()
    assert dangling(page) <= 0


def test_themes(visit):
    page = visit(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.keyboard.press("Alt+t")
    assert page.evaluate(paper) == dark
    page.keyboard.press("Alt+t")
    light = page.evaluate(paper)
    assert light != dark
    page.reload()
    assert page.evaluate(paper) == light


def test_everything_has_a_name_and_answers_are_not_read_out_word_by_word(visit):
    page = visit()
    page.evaluate(
        """() => {
          const status = document.getElementById("status");
          window.said = [];
          const note = () => window.said.push(status.textContent);
          new MutationObserver(note).observe(status, { childList: true });
        }"""
    )
    ask(page, "markdown")
    expect(page.locator("#log")).to_have_attribute("aria-live", "off")
    tokens = sum(map(len, rounds_of(MARKDOWN)))
    said = ["The model answers", f"The answer is complete: {tokens} tokens"]
    assert page.evaluate("window.said") == said
    nameless = page.evaluate(
        """() => {
          const all = document.querySelectorAll("button, input, select, textarea, [role=img]");
          const named = (node) => node.ariaLabel || node.textContent.trim() || node.labels?.length;
          return [...all].filter((node) => !named(node)).map((node) => node.outerHTML);
        }"""
    )
    assert nameless == []


def test_the_page_is_small_and_needs_nothing_from_outside():
    folder = Path(__file__).parents[1] / "redrafter_mlx" / "server" / "page"
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, path.name
        assert "innerHTML" not in text, path.name
        outside = r"""(src|href|url|import|from)\s*[=(]?\s*["']https?:"""
        assert not re.search(outside, text), path.name
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?![^>]*src=)|\sstyle=|\son\w+=", html)
