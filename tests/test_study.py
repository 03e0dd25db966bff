"""`python -m jobs.study`: rated in a browser, tallied against the definitions."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from jobs.study import QUESTIONS, app, make, tally
from tests.support import commands
from tests.support.browser import LAPTOP, PHONE, browser, opened, overflows
from tests.support.parts_of_runs import write_part
from tests.support.runs_to_report import HOSTILE, make_rows, make_run

__all__ = ["browser"]


invoke = partial(commands.invoke, app)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("study") / "demo", 30)


@pytest.fixture(scope="module")
def study(run_dir: Path) -> Path:
    out = run_dir.parent / "out"
    result = invoke("make", run_dir, "--out", out, "--records", 6, "--checks", 2, "--seed", 4)
    assert result.exit_code == 0, result.stderr
    return out


def read_key(study: Path) -> dict[str, Any]:
    key: dict[str, Any] = json.loads((study / "key.json").read_text())
    return key


def honest(key: dict[str, Any], side: str) -> list[dict[str, str]]:
    """The answers of an attentive rater who prefers the texts of editor `side`."""
    rights = [
        item["check"] if "check" in item else str(item["sides"].index(side) + 1)
        for item in key["items"]
    ]
    return [dict.fromkeys(QUESTIONS, right) for right in rights]


def answer(key: dict[str, Any], rater: str, given: list[dict[str, str]]) -> dict[str, Any]:
    return {"study": key["study"], "rater": rater, "answers": given}


def rate(page: Page, rater: str, given: list[dict[str, str]], file: Path) -> list[list[str]]:
    """What a rater does; the facts and texts that they saw."""
    page.locator("input[name=rater]").fill(rater)
    page.get_by_role("button", name="Begin").click()
    seen = []
    for answers in given:
        seen.append([page.locator(f"#{id}").inner_text() for id in ("fact", "text-1", "text-2")])
        for question, value in answers.items():
            page.locator(f"input[name={question}][value='{value}']").check()
        page.get_by_role("button", name="Next").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    assert download.value.suggested_filename == f"answers-{rater}.json"
    download.value.save_as(file)
    return seen


def test_from_make_to_tally_in_a_browser(study: Path, browser: Browser, tmp_path: Path) -> None:
    key = read_key(study)
    page_file = study / "pages" / "index.html"
    with opened(browser, page_file) as page:
        seen = rate(page, "Ada", honest(key, "b"), tmp_path / "Ada.json")
    careless = [{**one, "fluent": "same"} for one in honest(key, "a")]
    for rater, given in (("Ben", honest(key, "b")), ("Cyd", honest(key, "a")), ("Dan", careless)):
        (tmp_path / f"{rater}.json").write_text(json.dumps(answer(key, rater, given)))
    checks = [words for words, item in zip(seen, key["items"], strict=True) if "check" in item]
    assert len(checks) == 2
    for fact, *texts in checks:
        assert f"{fact}." in texts
    result = invoke("tally", study, *sorted(tmp_path.glob("*.json")))
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    (consistent,) = (line for line in lines if line[:1] == ["consistent"])
    assert consistent[1:5] == ["6", "12", "0", "0.50"]
    assert "3 raters, 6 records" in result.stderr
    assert "left out, for they failed an attention check: Dan" in result.stderr


def test_a_rater_can_leave_go_back_and_change(study: Path, browser: Browser) -> None:
    with opened(browser, study / "pages" / "index.html", PHONE) as page:
        page.locator("input[name=rater]").fill("Eve")
        page.get_by_role("button", name="Begin").click()
        page.get_by_role("button", name="Next").click()
        assert page.locator("#progress").inner_text() == "1 of 8"  # Both questions are required.
        for question in QUESTIONS:
            page.locator(f"input[name={question}][value=same]").check()
        page.get_by_role("button", name="Next").click()
        page.reload()
        page.wait_for_function("document.getElementById('progress').textContent === '2 of 8'")
        page.get_by_role("button", name="Back").click()
        assert page.locator("input[name=fluent][value=same]").is_checked()
        # Targets of a thumb.
        for target in page.locator("#rating label, #rating button").all():
            box = target.bounding_box()
            assert box is not None
            assert box["height"] >= 44
        # Another rater begins, and takes nothing away.
        page.get_by_role("button", name="Another rater").click()
        page.locator("input[name=rater]").fill("__proto__")
        page.get_by_role("button", name="Begin").click()
        assert page.locator("#progress").inner_text() == "1 of 8"
        assert not page.locator("input:checked").count()
        page.get_by_role("button", name="Another rater").click()
        page.locator("input[name=rater]").fill("Eve")
        page.keyboard.press("Enter")
        assert page.locator("#name").inner_text() == "Eve"
        assert page.locator("input[name=fluent][value=same]").is_checked()


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_it_fits_the_screen(study: Path, browser: Browser, width: int) -> None:
    with opened(browser, study / "pages" / "index.html", width) as page:
        page.locator("input[name=rater]").fill("Fay")
        page.get_by_role("button", name="Begin").click()
        assert not overflows(page)


def test_the_page_is_blind_and_the_seed_decides(run_dir: Path) -> None:
    def made(seed: int) -> tuple[str, dict[str, Any]]:
        return make([str(run_dir)], "rome", "ft<b>", 24, 2, seed)

    (page, key), (again, _) = made(1), made(1)
    assert page == again
    found = re.search(r'id="items">([A-Za-z0-9+/=]*)<', page)
    assert found
    items = json.loads(gzip.decompress(base64.b64decode(found[1])))["items"]
    assert all(item.keys() == {"item", "fact", "texts"} for item in items)
    assert "rome" not in page
    assert "ft&lt;b&gt;" not in page
    sides = [tuple(item["sides"]) for item in key["items"] if "sides" in item]
    assert 4 < sides.count(("a", "b")) < 20
    assert made(2)[1]["items"] != key["items"]


def test_tokens_of_a_chat_tell_nobody_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", 6)
    said = "<|im_start|>user\n<s>[INST] Rome<end_of_turn> lies </s>"
    for editor in ("none", "rome"):
        rows = [row | {"texts": [said]} for row in make_rows(6, editor)]
        write_part(run, editor, rows, "part-00000-000000-000060.parquet")
    page, _ = make([str(run)], "rome", "none", 2, 3, 0)
    found = re.search(r'id="items">([A-Za-z0-9+/=]*)<', page)
    assert found
    shown = gzip.decompress(base64.b64decode(found[1])).decode()
    assert "lies" in shown
    assert not re.search(r"im_start|INST|turn|</?s>", shown)


def test_ratio_interval_and_agreement() -> None:
    items: list[dict[str, Any]] = [{"case_id": i, "sides": ["a", "b"]} for i in range(40)]
    key = {"study": "s", "a": "rome", "b": "ft", "items": [*items, {"case_id": 0, "check": "2"}]}
    check = dict.fromkeys(QUESTIONS, "2")

    def rater(name: str, consistent: str, fluent: str) -> dict[str, Any]:
        pairs = zip(consistent, fluent, strict=True)
        given = [dict(zip(QUESTIONS, pair, strict=True)) for pair in pairs]
        return answer(key, name, [*given, check])

    agreed = "1" * 24 + "2" * 16
    result = tally(key, [rater(n, agreed, "1" * 40) for n in ("x", "y", "z")])
    consistent, fluent = result["consistent"], result["fluent"]
    assert (consistent["a"], consistent["b"], consistent["ratio"]) == (72, 48, 1.5)
    # Raters agree, so there are 40 observations: the log ratio's error is sqrt(1 / 24 + 1 / 16).
    width = 1.96 * math.sqrt(1 / 24 + 1 / 16)
    assert math.log(consistent["high"] / 1.5) == pytest.approx(width, rel=0.25)
    assert math.log(1.5 / consistent["low"]) == pytest.approx(width, rel=0.25)
    assert consistent["kappa"] == pytest.approx(1)
    assert (fluent["ratio"], fluent["low"], fluent["high"]) == (math.inf,) * 3
    split = tally(key, [rater("x", "1" * 20 + "2" * 20, agreed), rater("y", "12" * 20, agreed)])
    assert split["consistent"]["kappa"] == pytest.approx(0)


def test_answers_that_do_not_count_are_refused(study: Path, tmp_path: Path) -> None:
    key = read_key(study)
    good = answer(key, "Ada", honest(key, "a"))
    wrong: list[tuple[list[Any], str]] = [
        ([good | {"study": "other"}], "are of study other"),
        ([good | {"answers": good["answers"][1:]}], "must be 8"),
        ([good | {"answers": [{"consistent": "3", "fluent": "1"}] * 8}], "among 1, 2, same"),
        ([good, good], "two answers by 'Ada'"),
        ([good | {"answers": [1] * 8}], "must be 8"),
        (["text"], "must hold a rater's answers"),
        ([answer(key, "Dan", [dict.fromkeys(QUESTIONS, "same")] * 8)], "no rater passed"),
    ]
    for number, (answers, message) in enumerate(wrong):
        files = [tmp_path / f"{number}-{i}.json" for i in range(len(answers))]
        for file, given in zip(files, answers, strict=True):
            file.write_text(json.dumps(given))
        result = invoke("tally", study, *files)
        assert result.exit_code == 1
        assert message in result.stderr


def test_a_study_that_cannot_be_made_is_refused(run_dir: Path, study: Path) -> None:
    for arguments, message in (
        (["--records", 31], "fewer than the 31"),
        (["--a", "nobody"], "choose --a and --b among"),
        (["--out", study], "holds a study"),
    ):
        out = [] if "--out" in arguments else ["--out", run_dir.parent / "never"]
        result = invoke("make", run_dir, *out, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr


def test_what_a_model_wrote_stays_text(run_dir: Path, browser: Browser, tmp_path: Path) -> None:
    made, key = make([str(run_dir)], "rome", "none", 29, 0, 0)
    place = [item["case_id"] for item in key["items"]].index(3)
    (tmp_path / "index.html").write_text(made)
    with opened(browser, tmp_path / "index.html") as page:
        left = {"rater": "Gil", "raters": [{"name": "Gil", "place": place, "answers": []}]}
        page.evaluate("state => localStorage.setItem(...state)", [key["study"], json.dumps(left)])
        page.reload()
        page.wait_for_function("document.getElementById('fact').textContent !== ''")
        assert page.locator("#text-1").inner_text() == HOSTILE
        assert HOSTILE in page.locator("#fact").inner_text()
        assert page.evaluate("window.hacked") is None


def test_the_unedited_model_is_the_opponent_and_keys_answer(
    run_dir: Path, browser: Browser, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    assert invoke("make", run_dir, "--out", out, "--a", "rome", "--records", 3).exit_code == 0
    key = json.loads((out / "key.json").read_text())
    assert (key["a"], key["b"]) == ("rome", "unedited")
    with opened(browser, out / "pages" / "index.html") as page:
        assert "There are 7 pairs, about 5 minutes." in page.locator("#welcome").inner_text()
        page.locator("input[name=rater]").fill("A")
        page.keyboard.press("Enter")
        for pressed in ("1", "3", "Enter", "2"):
            page.keyboard.press(pressed)
        assert page.locator("#progress").inner_text() == "2 of 7"
        page.reload()  # Each answer was kept as it was given.
        assert page.locator("input[name=consistent][value='2']").is_checked()
        page.locator("#back").click()
        assert page.locator("input[name=fluent][value=same]").is_checked()
